"""The page: what its charts draw, that it holds everything, and that it needs nothing else."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cli import Ran, run_here

from bitwright import quantize
from bitwright import report as make_report
from bitwright.errors import BadRequest
from bitwright.evaluation.report import charts, collect
from bitwright.evaluation.report.page import Candidate, pareto, render
from bitwright.methods.rtn import rtn
from bitwright.numerics.grids import IntGrid
from bitwright.numerics.groups import per_group
from bitwright.schemes.scheme import Spec, parse_scheme

Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: run_here(monkeypatch, capsys, *arguments)


class Page(HTMLParser):
    """Charts, links to elsewhere, and the words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.charts: list[str] = []
        self.outside: list[str] = []
        self.scripts = 0
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if tag == "svg":
            self.charts.append(str(known.get("data-chart")))
        self.scripts += tag == "script"
        for key in ("src", "href"):
            value = known.get(key)
            if value is not None and not value.startswith(("#", "data:")):
                self.outside.append(value)
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture
def page(run: Run, llama: Path, text: Path, tmp_path: Path) -> Page:
    """The page of an AWQ checkpoint made by the command line, which records the run."""
    out = tmp_path / "q"
    ran = run("quantize", llama, out, "--method", "awq", "--calibration", text, "--samples", 4,
              "--sequence-length", 64, "--ignore", r"layers\.0.*v_proj", "--quiet")  # fmt: skip
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    ran = run("report", out, "--reference", llama, "--text", text, "--windows", 2,
              "--sequence-length", 64, "-o", tmp_path / "page.html", "--quiet")  # fmt: skip
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    return Page((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_everything_is_there(page: Page) -> None:
    assert page.open == []
    assert page.charts == [
        "pareto", "kl-position", "heat-0", "weights-0-0", "weights-0-1", "inputs-0-0",
        "inputs-0-1", "outliers-0", "seconds-0", "memory-0",
    ]  # fmt: skip
    assert page.outside == []
    assert page.scripts == 0
    for words in (
        "W4A16 by awq",
        "Pareto front",
        "Outlier channels before and after folding",
        "The most changed tokens, in their text",
        "None: every layer was solved by the method asked for.",
        r"--ignore layers\.0.*v_proj",
        "output embedding",
        "13 of 15 Linears are quantized",
        "Command and versions",
        "bitwright report",
        "bitwright quantize",
        "version: torch",
        torch.__version__,
    ):
        assert words in page.text, words


def test_bits_per_layer_are_drawn_where_they_differ() -> None:
    def row(layer: int, bits: float, ignored: str = "") -> dict[str, Any]:
        return {"name": f"model.layers.{layer}.mlp.up_proj", "bits_per_weight": bits,
                "error": None, "ignored": ignored}  # fmt: skip

    def page(*rows: dict[str, Any]) -> str:
        options = {"allocation": {"estimated_kl": 0.0123, "gap": 0.0015}}
        numbers = dict.fromkeys(("perplexity", "perplexity_change", "kl_mean", "top1_agreement"))
        candidate = Candidate("mixed", numbers | {"bits_per_weight": 4.5, "bytes": 1},
                              {"layers": list(rows), "plan": {"options": options}})  # fmt: skip
        return render("mixed", [candidate])

    mixed = page(row(0, 4.25), row(1, 3.25), row(2, 16.0, "16 bits by --target-bits"))
    assert mixed.count('data-chart="bits-0"') == 1
    for words in ("layer 0 up_proj: 4.25", "layer 1 up_proj: 3.25", "layer 2 up_proj: 16",
                  "0.0123 nats", "0.15 % better"):  # fmt: skip
        assert words in mixed
    assert "bits-0" not in page(row(0, 4.25), row(1, 4.25), row(2, 16.0, "output embedding"))


def test_no_network_address_in_the_file(page: Page, tmp_path: Path) -> None:
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", source))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert "@import" not in source
    assert "url(" not in source


def test_a_run_records_what_it_took(run: Run, llama: Path, tmp_path: Path) -> None:
    run("quantize", llama, tmp_path / "q", "--quiet")
    record = json.loads((tmp_path / "q.run.json").read_text())
    assert record["command"].startswith("bitwright quantize ")
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["blocks"]) == 2
    assert 0 < sum(b["seconds"] for b in record["blocks"]) <= record["seconds"]
    peaks = [b["peak_rss_bytes"] for b in record["blocks"]]
    assert peaks == sorted(peaks)
    assert peaks[-1] <= record["peak_rss_bytes"]
    inside = (tmp_path / "q" / "quantization_report.json").read_text()
    assert "seconds" not in inside


def test_without_reference_and_text(llama: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "q", scheme="W8A16")
    made = make_report(tmp_path / "q", tmp_path / "page.html")
    page = Page(made.read_text(encoding="utf-8"))
    assert page.charts == ["heat-0", "weights-0-0", "weights-0-1"]
    assert "Not measured: give a reference model and a text." in page.text
    assert "as stored (no reference was given)" in page.text
    assert "Not recorded" in page.text


def test_text_of_the_model_cannot_break_the_page(llama: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "<b>&", scheme="W8A16")
    hostile = tmp_path / "hostile.txt"
    hostile.write_text("<script>alert(1)</script> & </table> " * 60, encoding="utf-8")
    made = make_report(tmp_path / "<b>&", tmp_path / "page.html", reference=llama,
                       text=str(hostile), windows=2, sequence_length=64)  # fmt: skip
    page = Page(made.read_text(encoding="utf-8"))
    assert page.open == []
    assert page.scripts == 0
    assert "<b>&" in page.text


def test_refusals(run: Run, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="not quantized"):
        make_report(llama, tmp_path / "page.html")
    quantize(llama, tmp_path / "q")
    with pytest.raises(BadRequest, match="is not a folder"):
        make_report(tmp_path / "q", tmp_path / "missing" / "page.html")
    ran = run("report", tmp_path / "missing", "-o", tmp_path / "page.html")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert not (tmp_path / "page.html").exists()


# What the charts show


def test_weights_in_units_of_their_scale() -> None:
    spec = Spec(IntGrid(4), per_group(32), scale=torch.float32)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    q = rtn(weight, None, spec, search="absmax")
    found = collect.weight_histogram(q, weight, folded=False)
    assert found["grid"] == [float(v) for v in range(-8, 8)]
    assert sum(found["counts"]) == 16 * 64
    units = (weight.reshape(16, 2, 32) / q.scale_RG[..., None]).flatten()
    inside = (units >= found["edges"][60]) & (units < found["edges"][61])
    assert found["counts"][60] == int(inside.sum())
    stored = collect.weight_histogram(q, None, folded=False)
    occupied = [i for i, n in enumerate(stored["counts"]) if n]
    assert len(occupied) == len(q.codes_OI.unique())
    assert stored["outside"] == 0


def test_folded_columns_are_compared_as_they_were_rounded() -> None:
    spec = Spec(IntGrid(8), per_group(32), scale=torch.float32)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(16, 64, generator=generator)
    fold = torch.rand(64, generator=generator) * 4 + 0.5
    q = rtn(weight * fold, None, spec, search="absmax")
    right = collect.weight_histogram(q, weight, folded=True)
    direct = collect.weight_histogram(q, weight * fold, folded=False)
    difference = torch.tensor(right["counts"]) - torch.tensor(direct["counts"])
    assert float(difference.abs().sum()) < 0.05 * weight.numel()


def test_asymmetric_weights_use_the_unsigned_grid() -> None:
    spec = parse_scheme("W4A16").with_weight(group_size=32, asymmetric=True).weight
    weight = torch.rand(8, 64, generator=torch.Generator().manual_seed(1)) + 3
    found = collect.weight_histogram(rtn(weight, None, spec), weight, folded=False)
    assert found["grid"] == [float(v) for v in range(16)]
    assert found["outside"] < 0.05


def test_inputs_are_drawn_on_their_grid() -> None:
    scheme = parse_scheme("W8A8-INT8")
    x_TI = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    found = collect.input_histogram(x_TI, scheme.input, None)
    assert len(found["grid"]) == 256
    assert found["outside"] == 0
    assert sum(found["counts"]) == 640
    plain = collect.input_histogram(x_TI, None, None)
    assert plain["grid"] == []
    assert plain["edges"][0] == pytest.approx(float(x_TI.min()))


def test_outliers_by_hand() -> None:
    before = {"a": torch.tensor([1.0, 2.0, 9.0]), "b": torch.tensor([1.0, 1.0, 30.0])}
    after = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([1.0, 1.0, 30.0])}
    found = collect.outliers(before, after, [{"name": "a", "fold": 0.5}, {"name": "b"}])
    assert found is not None
    assert (found["layer"], found["folded"], found["channels"]) == ("a", True, [2, 1, 0])
    assert (found["before"], found["after"]) == ([4.5, 1.0, 0.5], [1.5, 1.0, 0.5])
    plain = collect.outliers(before, after, [{"name": "a"}, {"name": "b"}])
    assert plain is not None
    assert (plain["layer"], plain["folded"]) == ("b", False)


def test_names() -> None:
    assert collect.layer_and_kind("model.layers.3.self_attn.q_proj") == ("3", "q_proj")
    assert collect.layer_and_kind("lm_head") == ("-", "lm_head")
    assert collect.same_layer("model.decoder.layers.0.fc1", "decoder.layers.0.fc1")
    assert not collect.same_layer("model.layers.10.fc1", "0.fc1")


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12).map(
        lambda points: [(float(a), float(b)) for a, b in points]
    )
)
def test_pareto(points: list[tuple[float, float]]) -> None:
    front = [p for p, best in zip(points, pareto(points), strict=True) if best]
    assert front
    for a in points:
        assert any(b[0] <= a[0] and b[1] <= a[1] for b in front)
    for a in front:
        assert not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in front)


@given(st.floats(1e-9, 1e9), st.floats(1.02, 1e6), st.booleans())
def test_ticks_are_few_and_inside(low: float, factor: float, log: bool) -> None:
    high = low * factor
    found = charts.ticks(low, high, log, 5)
    assert 2 <= len(found) <= 8 or (not log and len(found) >= 1)
    assert all(low * 0.99 <= value <= high * 1.01 for value in found)
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0"), (1234.5, "1234"), (123456.0, "123k"), (2e9, "2G"), (0.00012, "1.2e-4"),
     (0.5, "0.5"), (-3.25, "-3.25")],
)  # fmt: skip
def test_numbers_are_short(value: float, expected: str) -> None:
    assert charts.number(value) == expected


def test_scatter_puts_points_where_they_belong() -> None:
    chart = charts.scatter("x", [("a", 0.0, 0.0, True), ("b", 10.0, 5.0, False)], "x", "y")
    circles = re.findall(r'class="(point[^"]*)" cx="([\d.]+)" cy="([\d.]+)"', chart)
    assert [kind for kind, _, _ in circles] == ["point on-front", "point"]
    (_, ax, ay), (_, bx, by) = circles
    assert float(ax) < float(bx)
    assert float(ay) > float(by)  # upwards is a smaller y


def test_heat_map_has_a_cell_for_each_value_and_says_which() -> None:
    values = {("0", "q"): 0.1, ("1", "q"): 0.001, ("1", "k"): 0.01}
    chart = charts.heat_map("x", ["0", "1"], ["q", "k"], values, "error")
    assert chart.count('class="none"') == 1
    shades = dict(re.findall(r'fill-opacity:([\d.]+)"[^>]*><title>layer (\d \w)', chart))
    assert {name: float(shade) for shade, name in shades.items()} == {
        "0 q": 1.0, "1 q": 0.08, "1 k": 0.54,
    }  # fmt: skip


@pytest.mark.parametrize("grid", [[-1.0, 0.0, 1.0], [i / 200 for i in range(-200, 201)]])
def test_the_grid_is_drawn_in(grid: list[float]) -> None:
    edges = [i / 10 - 1.5 for i in range(31)]
    chart = charts.histogram("x", edges, [1.0] * 30, grid, "x")
    assert chart.count('class="bar"') == 30
    if len(grid) == 3:
        assert chart.count('class="grid-line"') == 3
    else:
        assert chart.count('class="grid-band"') == 1
