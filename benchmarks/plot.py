"""The picture in the README and the tables of docs/cpu.md, from the committed results: python -m benchmarks.plot [--markdown].

On the left how many times faster fastpt is than each peer at each work, on the right the memory above the weights.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks import targets
from benchmarks.profile_step import markdown
from benchmarks.targets import ADAMW, ATTENTION, CLINC, FULL, GENERATION, GSM8K, HEAD, LORA, Run, Select

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/cpu.md"
OURS, THEIRS, INK = "#1f6feb", "#b8c0cc", "#24292f"
NAMES = {
    "fastpt": "fastpt", "trl": "TRL", "trl-ckpt": "TRL, checkpointing", "trl-bf16": "TRL, bf16 weights",
    "trl+fuse": "TRL + fastpt.fuse", "hf": "plain bf16 loop", "hf-compile": "plain loop, torch.compile",
    "hf-trainer": "Trainer, fp32", "hf-trainer-bf16": "Trainer, bf16", "hf-trainer+fuse": "Trainer + fastpt.fuse",
    "hf-static": "static cache", "sdpa": "torch SDPA",
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """One work: bars of `ours` against all others, fastpt's own other figures left out."""

    title: str
    wanted: Select
    ours: str = "fastpt"
    key: str = "tokens_per_s"
    names: tuple[tuple[str, str], ...] = ()
    peers: str = "*"  # a pattern

    def ratios(self, runs: list[Run]) -> dict[str, float]:
        """Peer -> how many times as fast ours is."""
        is_time = self.key == "median_ms"
        found = targets.values(runs, self.wanted, self.key, **{"provider" if is_time else "peer": self.ours})
        if found is None:
            return {}
        mine, figures = found[1][self.ours], found[1]
        names = NAMES | dict(self.names)
        return {
            names.get(name, name): figure / mine if is_time else mine / figure
            for name, figure in figures.items()
            if name != self.ours and "fuse" not in name and "fastpt" not in name and fnmatchcase(name, self.peers)
        }

    def memory(self, runs: list[Run]) -> dict[str, float]:
        """Everyone's GiB above the weights, ours first."""
        found = targets.values(runs, self.wanted, "peak_above_weights_bytes", peer=self.ours)
        figures = {} if found is None else found[1]
        order = sorted(figures, key=lambda name: (name != self.ours, figures[name]))
        return {NAMES.get(name, name): figures[name] / 2**30 for name in order}


TRAINING = [
    Group("LoRA, packed 4 × 512", LORA),
    Group("LoRA, GSM8K rows", GSM8K),
    Group("full fine-tuning, packed 4 × 512", FULL),
    Group("MiniLM-L6, CLINC150 rows", CLINC, "hf-trainer+fuse", "rows_per_s"),
]
GENERATE = (("hf", "model.generate"), ("hf-static", "generate, static cache"))
OTHERS = [
    Group("fastpt.fuse inside TRL, LoRA, packed 4 × 512", LORA, "trl+fuse", peers="trl"),
    Group("generation, batch 1", {**GENERATION, "batch": 1}, names=GENERATE),
    Group("generation, batch 8", {**GENERATION, "batch": 8}, names=GENERATE),
    Group("attention, 4 × 512", {**ATTENTION, "shape": "4x512, 9 heads"}, key="median_ms"),
    Group("attention, 1 × 4096", {**ATTENTION, "shape": "1x4096, 9 heads"}, key="median_ms"),
    Group("head and loss, frozen", {**HEAD, "shape": "* frozen"}, key="median_ms"),
    Group("head and loss, trained", {**HEAD, "shape": "* trained"}, key="median_ms"),
    Group("AdamW, 135M parameters", {**ADAMW, "shape": "full*M, masters"}, key="median_ms"),
]


def draw(runs: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"font.size": 9, "svg.hashsalt": "fastpt", "text.color": INK, "axes.labelcolor": INK}
    from matplotlib import pyplot

    ratios = {g.title: found for g in [*TRAINING, *OTHERS] if (found := g.ratios(runs))}
    memory = {g.title: found for g in TRAINING if (found := g.memory(runs))}
    if not ratios:
        raise SystemExit(
            "plot: benchmarks/results holds no run with fastpt and a peer: run benchmarks.train_step first"
        )
    rows = max(sum(len(found) + 1.4 for found in panel.values()) for panel in (ratios, memory))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.6 + 0.24 * rows), width_ratios=(3, 2))
    _bars(left, ratios, lambda name: OURS, "{:.1f}×", rows)
    left.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    left.set_title("how many times faster fastpt is", loc="left", fontweight="bold")
    _bars(right, memory, lambda name: OURS if "fastpt" in name else THEIRS, "{:.1f} GiB", rows)
    right.set_title("memory above the weights", loc="left", fontweight="bold")
    figure.tight_layout(w_pad=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def _bars(axes: Any, groups: dict[str, dict[str, float]], colour: Any, text: str, rows: float) -> None:
    """Horizontal bars under the heading of their group, from the top down."""
    places, labels, y = [], [], 0.0
    widest = max((value for found in groups.values() for value in found.values()), default=1.0)
    for title, found in groups.items():
        heading = axes.text(0.012 * widest, y, title, fontweight="bold", va="center", fontsize=8.5)
        heading.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        for name, value in found.items():
            y += 1
            axes.barh(y, value, height=0.72, color=colour(name))
            axes.text(value + 0.012 * widest, y, text.format(value), va="center", fontsize=8)
            places.append(y)
            labels.append(name)
        y += 1.4
    axes.set_yticks(places, labels)
    axes.set_ylim(rows - 0.4, -0.8)
    axes.set_xlim(0, 1.12 * widest)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def tables(runs: list[Run]) -> dict[str, str]:
    """What docs/cpu.md takes from the results, by the names of its marks."""
    profiles = [markdown(record) for run in runs for record in run if "ops" in record]
    return {"targets": targets.markdown(runs), "profile": "\n\n".join(profiles) or "Not measured."}


def filled(page: str, blocks: dict[str, str]) -> str:
    """The page with what stands between `<!-- name -->` and `<!-- end -->` replaced."""
    for name, text in blocks.items():
        begin = page.index(f"<!-- {name} -->") + len(f"<!-- {name} -->")
        page = f"{page[:begin]}\n{text}\n{page[page.index('<!-- end -->', begin) :]}"
    return page


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=targets.RESULTS, help="folder with the JSON lines")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/cpu.svg", help="svg or png")
    parser.add_argument("--page", type=Path, default=PAGE, help="markdown with <!-- targets --> and <!-- profile -->")
    parser.add_argument("--markdown", action="store_true", help="print the tables and write nothing")
    options = parser.parse_args(argv)
    runs = targets.load_runs(options.results)
    if options.markdown:
        print("\n\n".join(tables(runs).values()))
        return 0
    draw(runs, options.picture)
    options.page.write_text(filled(options.page.read_text(), tables(runs)))
    print(f"wrote {options.picture} and {options.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
