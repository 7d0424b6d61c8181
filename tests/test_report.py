"""What the report says of runs, and whether its page can be read on phones and desks, by day and by night."""

import csv
import json
import math
import re
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, Commands
from ended import IMAGES, drawn, plant
from PIL import Image

from convlora import page, report, results, train
from convlora.comparison import compare, extremes, grids, notes, unlike
from convlora.results import difference, interval
from convlora.run import METRICS, SCORES, write_json, write_record, write_rows


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_runs_that_equal_the_baseline_differ_by_nothing(tmp_path: Path) -> None:
    ours, theirs = (
        [plant(tmp_path / f"{name}{seed}", f"peft={name}", seed, drawn(seed)) for seed in range(3)]
        for name in ("dora", "lora")
    )
    found = difference(ours, theirs, "dice", "kvasir")
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert (found.seeds, found.unpaired, found.images) == ((0, 1, 2), (), IMAGES)


def test_a_shift_of_all_scores_is_found_whatever_the_seeds_and_images_do(tmp_path: Path) -> None:
    ours = [plant(tmp_path / f"o{s}", "peft=dora", s, np.add(drawn(s), 0.05)) for s in (0, 1, 5)]
    theirs = [plant(tmp_path / f"t{s}", "peft=lora", s, drawn(s)) for s in (0, 1, 7)]
    found = difference(ours, theirs, "dice", "kvasir")
    assert found.mean == pytest.approx(0.05)
    assert (found.low, found.high) == pytest.approx((0.05, 0.05))
    assert (found.seeds, found.unpaired) == ((0, 1), (5, 7))
    none = difference(ours[2:], theirs, "dice", "kvasir")
    assert math.isnan(none.mean)
    assert none.seeds == ()


def test_a_single_seed_has_an_interval_over_images_if_its_score_is_a_mean_over_them(tmp_path: Path) -> None:
    [ours], [theirs] = (
        [plant(tmp_path / name, f"peft={name}", 0, drawn(k), ber=0.5 + k)]
        for k, name in enumerate(("lora", "dora"))
    )
    found = difference([ours], [theirs], "dice", "kvasir")
    assert found.low < found.mean < found.high
    assert found.images == IMAGES
    pooled = difference([ours], [theirs], "ber", "kvasir")
    assert pooled.mean == -1
    assert math.isnan(pooled.low)
    assert pooled.images == 0


@pytest.mark.parametrize(("seeds", "least"), [(1, 0.9), (2, 0.88), (3, 0.9), (8, 0.9)])
def test_the_interval_holds_the_mean_about_as_often_as_it_says(seeds: int, least: float) -> None:
    """Seeds and images have effects of their own, and each pair a random part."""
    rng = np.random.default_rng(1)
    trials, images, held = 250, 40, 0
    of_seed = 0.0 if seeds == 1 else 0.02  # of a single one, nothing tells
    for _ in range(trials):
        values = rng.normal(0, of_seed, (seeds, 1)) + rng.normal(0, 0.05, (1, images))
        low, high = interval(values + rng.normal(0, 0.05, (seeds, images)))
        held += low < 0 < high
    assert least <= held / trials <= 0.995


def test_nothing_is_drawn_of_a_single_number_nor_of_none() -> None:
    assert all(map(math.isnan, interval(np.ones((1, 1)))))
    assert all(map(math.isnan, interval(np.array([[1.0, math.nan]]))))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two ranks by two numbers of experts and LoRA, two seeds each, and another data set."""
    folder = tmp_path / "sweep"
    for seed in (0, 1):
        plant(folder / f"lora{seed}", "peft=lora", seed, drawn(seed), {"peft": {"rank": 3}})
        for rank in (2, 8):
            for experts in (4, 16):
                name = f"peft.rank={rank} peft.num_experts={experts}"
                settings = {"peft": {"rank": rank, "num_experts": experts}, "logger": f"log{rank}"}
                scores = drawn(seed, 0.01 * rank + 0.001 * experts)
                run = plant(folder / f"{rank}_{experts}_{seed}", name, seed, scores, settings)
                routes = {"blocks.0": {"expert_1_scale_1": 0.25, "expert_2_scale_2": 0.75, "entropy": 0.81}}
                write_rows(run.folder / "routing.csv", "layer", routes)
                bins = {str(i): {"probability": i / 3, "true": i / 4, "pixels": 0.3} for i in range(1, 4)}
                write_rows(run.folder / "reliability.csv", "bin", bins)
                noise = np.random.default_rng(seed).integers(0, 255, (200, 400, 3), np.uint8)
                Image.fromarray(noise).save(run.folder / "overlays.png")
    names = {"miou": 0.5, "iou_sea": 0.25, "iou_a_class_of_a_very_long_name_indeed": 0.75}
    plant(folder / "other", "dataset=sea", 0, drawn(0), dataset="sea", **names)
    return folder


def test_a_table_has_means_errors_and_paired_differences(cli: Commands, sweep: Path) -> None:
    done = cli(report, f"runs={sweep}", "baseline=lora")
    assert done.code == 0, done.err
    table = rows(sweep / "report.csv")
    assert table[0]["setting"] == "peft.rank=8 peft.num_experts=16"
    assert [row["dataset"] for row in table] == ["kvasir"] * 5 + ["sea"]
    best = table[0]
    values = [statistics.fmean(drawn(seed, 0.096)) for seed in (0, 1)]
    assert float(best["kvasir/dice"]) == pytest.approx(statistics.fmean(values))
    assert float(best["kvasir/dice_error"]) == pytest.approx(abs(values[0] - values[1]) / 2)
    assert float(best["kvasir/dice_difference"]) == pytest.approx(0.096)
    assert best["kvasir/dice_difference_seeds"] == "0 1"
    assert float(best["kvasir/dice_difference_low"]) <= 0.096 + 1e-9
    text = (sweep / "report.md").read_text()
    cells = "| 1 | peft.rank=8 peft.num_experts=16 | 2 |"
    assert cells in text
    assert "+0.0960 [+0.0960, +0.0960]" in text
    assert "| baseline |" in text


def test_a_page_shows_each_part_and_needs_nothing_else(cli: Commands, sweep: Path) -> None:
    assert cli(report, f"runs={sweep}", "baseline=lora").code == 0
    text = (sweep / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)[^"']*|url\((?!#)|@import|<script""", text)
    heads = re.findall(r"<h3>(.*?)</h3>", text)
    first = heads[: heads.index("Settings that differ") + 1]
    assert first == [
        "Rank and number of experts",
        "dice against cost",
        "Learning curves",
        "Reliability",
        "All scores",
        "Images",
        "Routing",
        "Settings that differ",
    ]
    assert "Classes" in heads[len(first) :]
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)) <= {
        pair for name in ids for pair in ((name, ""), ("", name))
    }
    assert "only one of the two" not in text
    assert text.count("No run here is of the baseline, lora.") == 1


def test_a_grid_and_what_differs_are_those_of_the_runs(sweep: Path) -> None:
    section, other = compare(results.find(sweep), None, "peft=lora")
    [grid] = grids(section)
    assert (grid.ranks, grid.experts) == ([2, 8], [4, 16])
    base = statistics.fmean(drawn(0) + drawn(1))
    assert np.allclose(grid.means, base + np.array([[0.024, 0.036], [0.084, 0.096]]))
    assert unlike(section) == {
        "peft.rank": ["8", "8", "2", "2", "3"],
        "peft.num_experts": ["16", "4", "16", "4", "-"],
    }
    assert (grids(other), unlike(other), other.baseline) == ([], {}, None)


def test_runs_are_seeds_of_one_setting_only_if_they_learnt_from_the_same_images(tmp_path: Path) -> None:
    def settings(*told: tuple[str, str, str], **loading: object) -> list[tuple[str, int]]:
        """Labels and numbers of seeds, of runs with these arguments, roots and training images."""
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        runs = []
        for seed, (arguments, root, training) in enumerate(told):
            lists = f"folds/{seed}" if "lists" in arguments else None
            config = {"dataset": {"root": root, "lists": lists}, "loading": loading}
            runs.append(plant(folder / str(seed), arguments, seed, [0.5, 0.6], config, training=training))
        [section] = compare(runs, None, None)
        assert any("learnt from other images" in note for note in notes(section)) == (
            "images=" in section.settings[0].label
        )
        return sorted((each.label, len(each.runs)) for each in section.settings)

    here, there = "data_root=here", "data_root=there"
    assert settings((here, "here", "8 (a)"), (there, "there", "8 (b)"), (here, "here", "8 (a)")) == [
        ("images=here: 8 (a), 2 (2f)", 2),
        ("images=there: 8 (b), 2 (2f)", 1),
    ]
    assert settings((here, "here", "8 (a)"), (there, "there", "8 (a)")) == [("defaults", 2)]
    assert settings((here, "here", "8 (a)"), (here, "here", "9 (b)")) == [
        ("images=here: 8 (a), 2 (2f)", 1),
        ("images=here: 9 (b), 2 (2f)", 1),
    ]
    folds = "dataset.lists=folds/${seed}"
    moved = ((f"{folds} data_root={i}", str(i), f"8 ({i})") for i in range(3))
    assert settings(*moved) == [("defaults", 3)]
    folds = "data_root=folds/${seed}"
    assert settings(*((folds, f"folds/{i}", f"8 ({i})") for i in range(3))) == [("defaults", 3)]
    assert settings((folds, "folds/0", "8 (0)"), (folds, "folds/1", "8 (1)"), (here, "here", "8 (2)")) == [
        ("images=folds/${seed}", 2),
        ("images=here: 8 (2), 2 (2f)", 1),
    ]
    same = ((folds, "folds/0", "8 (a)"), (folds, "folds/1", "8 (a)"), (here, "here", "8 (a)"))
    assert settings(*same) == [("defaults", 3)]
    assert settings((here, "here", "4 (a)"), (here, "here", "4 (b)"), shots=4) == [("defaults", 2)]


def test_images_that_tell_most_are_found(tmp_path: Path) -> None:
    plain = [0.5, 0.1, 0.9, 0.4, 0.6, 0.55, 0.45]
    other = [0.5, 0.1, 0.9, 0.8, 0.2, 0.56, 0.45]
    runs = [plant(tmp_path / "a", "peft=lora", 0, plain), plant(tmp_path / "b", "peft=dora", 0, other)]
    [section] = compare(runs, None, "peft=lora")
    found = {kind: [name for name, _ in images] for kind, images in extremes(section).items()}
    assert found["lowest"] == ["001.png", "003.png", "006.png"]
    assert found["highest"] == ["002.png", "004.png", "005.png"]
    assert found["greatest rise"] == ["003.png", "005.png"]
    assert found["greatest fall"] == ["004.png"]
    values = dict(extremes(section)["greatest rise"])["003.png"]
    assert values == [runs[each is not section.baseline].of_images("dice", "kvasir")["003.png"]
                      for each in section.settings]  # fmt: skip


def test_readers_are_told_what_an_interval_leaves_out(cli: Commands, tmp_path: Path) -> None:
    for seed in (0, 1):
        plant(tmp_path / f"runs/lora{seed}", "peft=lora", seed, drawn(seed))
    plant(tmp_path / "runs/dora1", "peft=dora", 1, drawn(3))
    plant(tmp_path / "runs/again", "peft=lora", 1, drawn(1))
    write_json(Path("runs/lora0", SCORES), {"dice": 0.5})  # of a model that is a run itself
    Path("runs/scored").mkdir()
    write_json(Path("runs/scored", SCORES), {"dice": 0.5})
    done = cli(report, "runs=[runs,runs/scored]", "baseline=lora", "output=out")
    assert done.code == 0, done.err
    assert "left out, since they evaluate adapters and are no runs: runs/scored\n" in done.out
    assert "3 runs: " in done.out
    assert cli(report, "runs=runs/dora1", "output=one").out.startswith("1 run: ")
    for name in ("report.md", "report.html"):
        text = Path("out", name).read_text()
        assert "A single seed, so that the interval is over images only: peft=dora." in text
        assert "peft=dora: only one of the two has seed 0, left out of the difference." in text
        assert "Left out, since they repeat setting and seed of another run: runs/lora1." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("runs=nowhere",), "runs=nowhere: no such folder; name one or several that hold runs"),
        (("runs=[empty]",), "runs=[empty]: no run there has ended (none has a summary.json)"),
        (
            ("runs=scored",),
            "runs=[scored]: evaluations of adapters (scores.json) but no runs, which a report "
            "compares; name the folders of the trainings",
        ),
        (("runs=[cut,scored]",), "no run there has ended"),
        (("runs=[]",), "runs=[] names no folder"),
        (
            ("runs=runs", "baseline=vera"),
            "baseline=vera is none of the settings; there are \"baseline='peft=dora'\"",
        ),
        (
            ("runs=runs", "baseline=sgd"),
            "baseline=sgd is several settings; name one of peft=dora optimizer=sgd",
        ),
        (("runs=runs", "score=iou"), "score=iou is not what all runs on kvasir have; they have dice, loss"),
        ((), "runs must be given; write runs=VALUE"),
    ],
)
def test_a_mistake_is_told_with_a_way_out(
    cli: Commands, tmp_path: Path, arguments: Sequence[str], message: str
) -> None:
    Path("empty").mkdir()
    Path("scored").mkdir()
    write_json(Path("scored", SCORES), {"dice": 0.5})
    Path("cut").mkdir()
    write_record(Path("cut"), [], {})
    for k, name in enumerate(
        ("peft=lora", "peft=dora", "peft=dora optimizer=sgd", "peft=lora optimizer=sgd")
    ):
        plant(tmp_path / f"runs/{name}", name, 0, drawn(k))
    done = cli(report, *arguments)
    assert done.code == 1
    assert message in done.err
    assert not list(tmp_path.rglob("report.*"))


@pytest.mark.slow
def test_fifty_runs_stay_below_ten_megabytes(cli: Commands, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (450, 300, 3), np.uint8)
    Image.fromarray(noise).resize((900, 1350)).save(tmp_path / "noise.png", compress_level=1)
    for number in range(50):
        run = plant(tmp_path / f"runs/{number}", f"optimizer.lr={number}", 0, drawn(number))
        steps = "".join(f"0,{step},{0.5 + number / step},\n" for step in range(1, 3000))
        (run.folder / METRICS).write_text(f"epoch,step,train/loss,val/dice\n{steps}")
        (run.folder / "overlays.png").hardlink_to(tmp_path / "noise.png")
        experts = {f"expert_{i}_scale_{i}": 0.125 for i in range(8)} | {"entropy": 3.0}
        write_rows(run.folder / "routing.csv", "layer", {f"blocks.{i}.attn.qkv": experts for i in range(32)})
    assert cli(report, "runs=runs").code == 0
    text = Path("runs/report.html").read_text()
    assert text.count("<img ") == 50
    assert len(text.encode()) < 10e6


def test_a_training_leaves_what_its_report_shows(cli: Commands) -> None:
    job = (*SMALL, "logger=csv", "dataset.train_size=2", "dataset.test_size=2", "trainer.max_epochs=1")
    assert cli(train, *job, "run_dir=run").code == 0
    bins = rows(Path("run/reliability.csv"))
    assert sum(float(row["pixels"]) for row in bins) == pytest.approx(1)
    assert cli(report, "runs=run").code == 0
    heads = re.findall(r"<h3>(.*?)</h3>", Path("run/report.html").read_text())
    assert heads == ["dice against cost", "Learning curves", "Reliability", "All scores", "Images", "Routing"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOOK = """<!doctype html><body style="margin:0"><iframe style="border:0;width:WIDTHpx;height:3000px"></iframe>
<pre id="found"></pre><script>
const frame = document.querySelector("iframe"), errors = [];
frame.onload = () => {
  const inner = frame.contentDocument, view = frame.contentWindow;
  inner.querySelectorAll("details").forEach(each => each.open = true);
  const scrolled = each => each.closest(".scroll") && !each.matches(".scroll");
  const wide = [...inner.querySelectorAll("body *")].filter(each => !each.closest("svg") && !scrolled(each)
    && each.getBoundingClientRect().right > WIDTH + 1).map(each => each.outerHTML.slice(0, 80));
  const cut = [...inner.querySelectorAll("th, td, h1, h2, h3, h4, li, p, summary, figcaption")]
    .filter(each => each.scrollWidth > each.clientWidth + 1).map(each => each.textContent);
  const spilt = [...inner.querySelectorAll("svg")].flatMap(svg => {
    const box = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("g[id*=text_]")].filter(each => {
      const own = each.getBoundingClientRect();
      return own.left < box.left - 1 || own.right > box.right + 1 || own.bottom > box.bottom + 1 })
  }).map(each => each.id);
  const images = [...inner.images];
  document.querySelector("#found").textContent = JSON.stringify({
    width: view.innerWidth, whole: inner.documentElement.scrollWidth, wide, cut, spilt, images: images.length,
    missing: images.filter(each => !(each.complete && each.naturalWidth)).length,
    paper: view.getComputedStyle(inner.body).backgroundColor, ink: view.getComputedStyle(inner.body).color });
};
frame.srcdoc = PAGE;
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_page_fits_its_screen(cli: Commands, sweep: Path, width: int, scheme: str) -> None:
    assert CHROMIUM is not None
    assert cli(report, f"runs={sweep}", "baseline=lora").code == 0
    text = json.dumps((sweep / "report.html").read_text()).replace("</", "<\\/")
    look = sweep / "look.html"
    look.write_text(LOOK.replace("WIDTH", str(width)).replace("PAGE", text))
    preferred = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", preferred)
    command = [CHROMIUM, *options, "--enable-logging=stderr", "--dump-dom", look.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1])  # type: ignore[index]
    assert found["whole"] <= found["width"] == width
    assert (found["wide"], found["cut"], found["spilt"], found["missing"]) == ([], [], [], 0)
    assert found["images"] == 4
    paper, ink = (sum(map(int, re.findall(r"\d+", found[name]))) for name in ("paper", "ink"))
    assert (paper > ink) == (scheme == "light")
    assert abs(paper - ink) > 3 * 150


def test_a_picture_takes_no_more_than_its_share(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 900, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    for share in (10**6, 10**5, 5 * 10**4):
        text = page.shrink(tmp_path / "noise.png", share)
        assert text is not None
        assert share / 8 < len(text.partition(",")[2]) <= share
    assert page.shrink(tmp_path / "none.png", 1) is None
