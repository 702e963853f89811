"""Every error bitwright raises on purpose.

BitwrightError
+-- BadRequest            the user asked for something that cannot be done
|   +-- UnknownName       a scheme, method, format or runtime that does not exist
|   +-- BadShape          a group size or layout that does not divide a tensor
|   +-- UnsupportedModel  the structure of the model could not be proved
+-- BadCheckpoint         the files given are missing, damaged or unsafe
|   +-- BadTensor         one tensor is missing, has the wrong shape or is not finite
+-- NotPositiveDefinite   a damped hessian has no Cholesky factor
+-- NoSpace               the disk is, or would become, full
+-- ClusterError          other machines cannot be reached or cannot finish

The command line turns each into one line on stderr and exit code 2.
"""


class BitwrightError(Exception):
    """Base of all errors raised on purpose; the message says what is wrong and what to do."""


class BadRequest(BitwrightError):
    """The request cannot be carried out as asked."""


class UnknownName(BadRequest):
    """A name that is not one of the known ones; the message lists them."""


class BadShape(BadRequest):
    """Sizes that do not fit together."""


class UnsupportedModel(BadRequest):
    """The model's structure could not be discovered and proved."""


class BadCheckpoint(BitwrightError):
    """A checkpoint that is missing, damaged or unsafe to read."""


class BadTensor(BadCheckpoint):
    """One tensor of a checkpoint is unusable."""


class NotPositiveDefinite(BitwrightError):
    """A matrix that should be positive definite is not; raise the damping."""


class NoSpace(BitwrightError):
    """Not enough room on the disk for the output."""


class ClusterError(BitwrightError):
    """A cluster that is not there, has no room, or lost its workers too often."""
