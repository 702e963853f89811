"""The folder of a comparison: what is done, what is not, and doing one row."""

import shutil
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from bitwright.api import calibration_tokens, load_tokenizer, prepare, resolve
from bitwright.commands.compare import Entry, Progress
from bitwright.commands.measure import candidate_of
from bitwright.commands.record import describe, read_json, versions, write_json
from bitwright.errors import BadRequest, BitwrightError, UnknownName
from bitwright.evaluation.remember import Remembered
from bitwright.evaluation.report.page import Candidate, render, write
from bitwright.evaluation.speed import tokens_per_second
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.pipeline.memory import return_freed_memory
from bitwright.pipeline.report import Report
from bitwright.pipeline.run import quantize_checkpoint
from bitwright.pipeline.texts import evaluation_windows, first_tokens
from bitwright.planning.plan import named_device, predicted_tokens_per_second
from bitwright.request import EFFORTS, Prepared
from bitwright.runtime.load import format_of, load_model, runs_as_stored
from bitwright.schemes.plan import Calibration


class Comparison:
    """Rows of one model under one set of settings, kept in a folder."""

    def __init__(
        self,
        model: str | Path,
        folder: Path,
        settings: dict[str, Any],
        command: str,
        overwrite: bool,
        calibrates: bool,
    ) -> None:
        self.source = resolve(model)
        if format_of(self.source) is not None:
            raise BadRequest(
                f"{self.source.folder} is already quantized: start from the original model"
            )
        self.folder, self.command = folder, command
        self.settings = settings | {
            "model": str(self.source.folder.resolve()),
            "model_bytes": self.source.nbytes,
        }
        known = {} if overwrite else read_json(folder / "results.json")
        if known and known.get("settings") != self.settings:
            other = [
                key for key, value in self.settings.items()
                if known.get("settings", {}).get(key) != value
            ]  # fmt: skip
            raise BadRequest(
                f"{folder} holds a comparison with another {', '.join(other)}: choose another "
                "output, the same settings, or --overwrite"
            )
        self._require_settings(calibrates)
        if overwrite:
            for part in ("details", "checkpoints"):
                shutil.rmtree(folder / part, ignore_errors=True)
        try:
            (folder / "details").mkdir(parents=True, exist_ok=True)
            (folder / "checkpoints").mkdir(exist_ok=True)
        except OSError as error:
            raise BadRequest(f"cannot write {folder}: {error.strerror or error}") from error
        self.reference: dict[str, Any] = known.get("reference", {}) or {
            "bytes": self.source.nbytes,
            "perplexity": None,
        }
        self.rows: dict[str, dict[str, Any]] = {row["name"]: row for row in known.get("rows", [])}

    def _require_settings(self, calibrates: bool) -> None:
        """Refuse, before any work, what would make every row fail."""
        named_device(self.settings["gpu"])
        if self.settings["effort"] not in EFFORTS:
            raise UnknownName(
                f"unknown effort {self.settings['effort']!r}; known: {', '.join(EFFORTS)}"
            )
        _ = self.windows
        if calibrates and self.settings["calibration"] != "self":  # the model takes long to write
            _ = self.tokens

    def is_done(self, entry: Entry) -> bool:
        """Whether there is a finished row with its details; failed ones are tried again."""
        row = self.rows.get(entry.name)
        return row is not None and row["status"] == "done" and self._details_file(entry).is_file()

    def add(self, entry: Entry, progress: Progress) -> None:
        """Quantize, measure, and append the row; what goes wrong becomes the row."""
        row: dict[str, Any] = {
            "name": entry.name, "scheme": entry.scheme, "method": entry.method, "status": "done",
            "reason": "",
        }  # fmt: skip
        try:
            row |= self._carry_out(entry, progress)
        except BitwrightError as error:
            row |= {"status": "failed", "reason": " ".join(str(error).split())}
        except Exception as error:  # one scheme's crash must not cost the other rows
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        self.rows[entry.name] = row
        self._save(list(self.rows.values()))
        return_freed_memory()

    def finish(self, entries: list[Entry]) -> dict[str, Any]:
        """Write results and page of the given entries; returns the results."""
        rows = [self.rows[entry.name] for entry in entries]
        others = [row for name, row in self.rows.items() if name not in {e.name for e in entries}]
        self._save(rows + others)
        candidates, failures = [], []
        for entry, row in zip(entries, rows, strict=True):
            if row["status"] == "done":
                saved = read_json(self._details_file(entry))
                parts = (saved["report"], saved["run"], saved["details"])
                candidates.append(Candidate(entry.name, row, *parts))
            else:
                failures.append(row)
        facts = [("command", self.command)]
        facts += [(f"setting: {key}", str(value)) for key, value in self.settings.items()]
        facts += [(f"version: {key}", value) for key, value in versions().items()]
        page = render(
            f"{self.source.folder.name}: {len(entries)} schemes compared",
            candidates,
            failures=failures,
            reference=self.reference,
            facts=[(key, value) for key, value in facts if value],
        )
        write(self.folder / "report.html", page)
        return self._results(rows)

    def _carry_out(self, entry: Entry, progress: Progress) -> dict[str, Any]:
        target = self.folder / "checkpoints" / entry.slug
        run = self._quantize(entry, target, progress)
        candidate = candidate_of(
            entry.name,
            open_checkpoint(target),
            self.windows,
            original=self.source,
            reference=self.original,
            remembered=self.remembered,
            run=run,
            progress=progress,
        )
        self.reference["perplexity"] = candidate.row["reference_perplexity"]
        self._describe_original()
        predicted = predicted_tokens_per_second(
            self.source.folder, [entry.scheme], self.settings["gpu"], self.windows.shape[1]
        )
        candidate.row["tokens_per_second_predicted"] = predicted[entry.scheme]
        candidate.row["tokens_per_second_measured"] = self._measured_speed(target)
        saved = {"report": candidate.report, "run": run, "details": candidate.details}
        write_json(self._details_file(entry), saved)
        return candidate.row

    def _measured_speed(self, checkpoint: Path) -> float | None:
        """Tokens per second here, where kernels run the codes as they are stored."""
        model = load_model(open_checkpoint(checkpoint), packed=True)
        return tokens_per_second(model, self.windows[0]) if runs_as_stored(model) else None

    def _describe_original(self) -> None:
        """The original's speed, predicted and measured, unless an earlier run knows it."""
        if "tokens_per_second_measured" in self.reference:
            return
        predicted = predicted_tokens_per_second(
            self.source.folder, ["W16A16"], self.settings["gpu"], self.windows.shape[1]
        )
        self.reference["tokens_per_second_predicted"] = predicted["W16A16"]
        measured = tokens_per_second(self.original, self.windows[0])
        self.reference["tokens_per_second_measured"] = measured

    def _quantize(self, entry: Entry, target: Path, progress: Progress) -> dict[str, Any]:
        """Make the checkpoint, unless an interrupted comparison left it complete."""
        prepared = prepare(
            self.source.folder,
            scheme=entry.scheme,
            method=entry.method,
            group_size=self._group_size(entry),
            calibration=self.calibration.source if entry.method != "rtn" else None,
            samples=self.calibration.samples,
            sequence_length=self.calibration.sequence_length,
            effort=self.settings["effort"],
            seed=self.settings["seed"],
        )
        record = self.folder / "details" / f"{entry.slug}.run.json"
        made = read_json(target / "quantization_report.json")
        if made.get("fingerprint") == prepared.plan.fingerprint and (known := read_json(record)):
            return known
        began = time.perf_counter()
        report = self._quantized(prepared, target, progress)
        blocks = sum(block.seconds for block in report.blocks)  # also those before a stop
        report.seconds = max(time.perf_counter() - began, blocks)
        run = describe(report, f"{entry.name}, as part of: {self.command}" if self.command else "")
        write_json(record, run)
        return run

    def _quantized(self, prepared: Prepared, target: Path, progress: Progress) -> Report:
        """Quantize, going on where a stopped comparison was; afresh if that was another run."""
        tokens = self.tokens if prepared.plan.calibration is not None else None

        def run(*, resume: bool) -> Report:
            return quantize_checkpoint(
                prepared.source, prepared.topology, target, prepared.plan, prepared.fmt,
                tokens_NT=tokens, overwrite=True, resume=resume, progress=progress,
            )  # fmt: skip

        if target.with_name(f".{target.name}.work").is_dir():
            try:
                return run(resume=True)
            except BadRequest:
                return run(resume=False)
        return run(resume=False)

    def _group_size(self, entry: Entry) -> int | str:
        """The size asked for; schemes that fix their own do without."""
        grouped = entry.scheme.startswith("W") and "A16" in entry.scheme
        return str(self.settings["group_size"]) if grouped else "auto"

    @property
    def calibration(self) -> Calibration:
        """Where calibration tokens come from."""
        s = self.settings
        return Calibration(s["calibration"], s["samples"], s["calibration_length"])

    @cached_property
    def tokens(self) -> Tensor:
        """The calibration windows, read or written once for all schemes."""
        tokens, _ = calibration_tokens(self.source, self.calibration, self.settings["seed"])
        return tokens

    @cached_property
    def windows(self) -> Tensor:
        """The windows that all are measured on."""
        count, length = self.settings["windows"], self.settings["sequence_length"]
        ids = first_tokens(load_tokenizer(self.source), self.settings["text"], count * length)
        return evaluation_windows(ids, count, length)

    @cached_property
    def original(self) -> Any:
        """The original's model."""
        return load_model(self.source)

    @cached_property
    def remembered(self) -> Remembered:
        """The original, its hidden states kept from row to row."""
        return Remembered(self.original)

    def _details_file(self, entry: Entry) -> Path:
        return self.folder / "details" / f"{entry.slug}.json"

    def _results(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "reference": self.reference,
            "rows": rows,
            "command": self.command,
            "versions": versions(),
            "calibration": asdict(self.calibration),
        }

    def _save(self, rows: list[dict[str, Any]]) -> None:
        write_json(self.folder / "results.json", self._results(rows))
