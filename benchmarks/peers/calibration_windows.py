"""Write the token windows that bitwright calibrates on, for the other tools to use as well.

python calibration_windows.py MODEL TEXT OUT.json --samples 64 --sequence-length 512 --seed 0
"""

import argparse
import json
from pathlib import Path

from bitwright.api import calibration_tokens, resolve
from bitwright.schemes.plan import Calibration


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--sequence-length", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    source = Calibration(args.text, args.samples, args.sequence_length)
    tokens, note = calibration_tokens(resolve(args.model), source, args.seed)
    args.out.write_text(json.dumps(tokens.tolist()))
    print(note or f"{tokens.shape[0]} windows of {tokens.shape[1]} tokens")


if __name__ == "__main__":
    main()
