"""What finished runs forgot: a probe of 20 Newsgroups on their encoders, run by run.

    make testbeds
    python -m experiments.analysis.forgotten runs/what_rank_2          # half a minute per run

The encoder before training was good at something else: mean-pooled embeddings of 1,500 articles
(48 tokens), standardised, a logistic regression fitted anew (C chosen among six from 0.0003 to 1 on
articles that are neither trained nor tested on, for the encoder before, and kept), accuracy on
1,500 test articles. Forgotten is what that loses. Reads the reported runs of the sweeps there,
writes forgotten.npz into each run's folder; finished runs are not measured again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.analysis import evidence, learned
from experiments.analysis.evidence import Claim, Verdict
from experiments.analysis.findings import COLOURS
from experiments.analysis.study import (
    Study,
    arm_of,
    folders_of,
    read_tuned,
    reported_folders,
    sweeps_in,
)
from lora_jax import RequestError
from lora_jax.data import encode_examples, limit_examples, load_newsgroups
from lora_jax.io import atomic_path

FILE = "forgotten.npz"
NUM_ARTICLES, MAX_LENGTH, BATCH = 1500, 48, 100
STRENGTHS = (0.0003, 0.001, 0.003, 0.01, 0.1, 1.0)
# Of one arm, by seed, (articles,): 1 where an article is lost, -1 where one is gained.
Lost = dict[int, np.ndarray]


class Probe:
    """The articles, and the regression that is fitted on an encoder's embeddings of them."""

    def __init__(self, model):
        splits = load_newsgroups()
        parts = {
            name: limit_examples(getattr(splits, name), NUM_ARTICLES)
            for name in ("train", "validation", "test")
        }
        self.model = model
        self.labels = {name: np.asarray(part.labels) for name, part in parts.items()}
        self.rows = {
            name: _padded(encode_examples(model.tokenizer, part, max_length=MAX_LENGTH))
            for name, part in parts.items()
        }
        self._embed = jax.jit(self._embedding)
        embedded = self._embeddings(model.params, tuple(self.rows))
        scores = [self._fit(embedded, c, "validation").mean() for c in STRENGTHS]
        self.strength = STRENGTHS[int(np.argmax(scores))]
        self.before = self._fit(embedded, self.strength, "test")

    def right(self, params) -> np.ndarray:
        """Whether each test article is put into its newsgroup, (articles,) bool."""
        return self._fit(self._embeddings(params, ("train", "test")), self.strength, "test")

    def _embedding(self, params, ids, mask):
        _, hidden = self.model.apply(params, ids, mask, output_hidden_states=True)
        weights = mask[..., None] / mask.sum(axis=1)[:, None, None]
        return jnp.sum(hidden[-1] * weights, axis=1)

    def _embeddings(self, params, names: Sequence[str]) -> dict[str, np.ndarray]:
        def embedded(ids, mask):
            batches = (slice(n, n + BATCH) for n in range(0, len(ids), BATCH))
            return np.concatenate(
                [np.asarray(self._embed(params, ids[b], mask[b])) for b in batches]
            )

        return {name: embedded(*self.rows[name]) for name in names}

    def _fit(self, embedded, strength: float, on: str) -> np.ndarray:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        scale = StandardScaler().fit(embedded["train"])
        probe = LogisticRegression(C=strength, max_iter=2000)
        probe.fit(scale.transform(embedded["train"]), self.labels["train"])
        return probe.predict(scale.transform(embedded[on])) == self.labels[on]


def measure(folder: Path, arms: Sequence[str] | None = None) -> int:
    """Measures each reported run of the sweeps in `folder`, or of these arms; returns how many
    anew."""
    probe, count = None, 0
    chosen = reported_folders(folder) if arms is None else folders_of(folder, arms)
    for folders in chosen.values():
        for run in folders.values():
            if (run / FILE).exists():
                continue
            adapted = learned.adapted(run)
            probe = probe or Probe(adapted.model)
            right = probe.right(adapted.method.merge(adapted.trainable, adapted.frozen))
            learned.adapted.cache_clear()  # a run of full fine-tuning holds a model
            with atomic_path(run / FILE) as path, open(path, "wb") as file:
                np.savez_compressed(file, right=right, before=probe.before)
            count += 1
            lost = 100 * (probe.before.mean() - right.mean())
            print(f"{run.name}: {lost:+.1f} points forgotten", flush=True)
    return count


def collect(folder: Path, out: Path) -> None:
    """Puts the measurements of the runs in `folder` into `out`/forgotten.npz, if there are any."""
    found, before = _read_file(out / FILE)
    for place in sweeps_in(folder):
        for path in sorted(place.glob(f"cells/*/{FILE}")):
            with np.load(path) as arrays:
                found[path.parent.name], before = arrays["right"], arrays["before"]
    if found:
        names = sorted(found)
        right = np.packbits(np.stack([found[name] for name in names]), axis=1)
        with atomic_path(out / FILE) as path, open(path, "wb") as file:
            np.savez_compressed(
                file, cells=np.array(names), right=right, before=np.packbits(before),
                count=len(before),
            )  # fmt: skip


def _read_file(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    if not path.exists():
        return {}, np.zeros(0, bool)
    with np.load(path, allow_pickle=False) as arrays:
        count = int(arrays["count"])
        rows = np.unpackbits(arrays["right"], axis=1)[:, :count].astype(bool)
        found = dict(zip(map(str, arrays["cells"]), rows, strict=True))
        return found, np.unpackbits(arrays["before"])[:count].astype(bool)


def read(out: str | Path) -> dict[str, Lost] | None:
    """What each arm forgot, by seed; None where nothing was measured."""
    out = Path(out)
    found, before = _read_file(out / FILE)
    if not found:
        return None
    tuned = read_tuned(out)
    lost: dict[str, Lost] = {}
    for name, right in found.items():
        own = lost.setdefault(arm_of(name, tuned), {})
        own[int(name.rpartition("-s")[2])] = before.astype(float) - right
    return lost


def compare(claim: Claim, first: Lost, second: Lost) -> Verdict:
    """The verdict on a claim about what the first forgets more than the second, in points."""
    seeds = sorted(first.keys() & second.keys())
    rows = np.stack([first[seed] - second[seed] for seed in seeds])
    return evidence.decide(claim, evidence.crossed(rows).scaled(100))


def table(study: Study, lost: Mapping[str, Lost]) -> str:
    """Markdown: what each arm learned, and forgot."""
    lines = ["| arm | test loss | forgotten, points, 95% | seeds |", "|---|---:|---:|---:|"]
    for name, own in lost.items():
        rows = np.stack([own[seed] for seed in sorted(own)])
        points = evidence.crossed(rows).scaled(100).interval()
        lines.append(
            f"| {name} | {study[name].losses.mean():.3f} | {points.estimate:+.1f} "
            f"[{points.low:+.1f}, {points.high:+.1f}] | {len(own)} |"
        )
    return "\n".join(lines)


def draw(study: Study, lost: Mapping[str, Lost]):
    """Points forgotten against test loss, a dot per run; hollow where the loss was matched."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    kinds = dict.fromkeys(name.removeprefix("matched-") for name in lost)
    palette = dict(zip(kinds, [*COLOURS, "#555555", "#c2185b", "#00838f"], strict=False))
    for name, own in lost.items():
        arm, kind = study[name], name.removeprefix("matched-")
        means = dict(zip(arm.seeds, arm.losses.mean(axis=1), strict=True))
        seeds = [seed for seed in sorted(own) if seed in means]
        colour = palette.get(kind, "#555555")
        axes.plot(
            [means[s] for s in seeds], [100 * own[s].mean() for s in seeds], "o", color=colour,
            label=name, fillstyle="none" if name != kind else "full", markersize=5,
        )  # fmt: skip
    axes.set_xlabel("test loss on glosses (nats)")
    axes.set_ylabel("forgotten of 20 Newsgroups (points)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _padded(encoded) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, (articles, MAX_LENGTH)."""
    ids = np.full((len(encoded), MAX_LENGTH), encoded.pad_id, np.int32)
    mask = np.zeros((len(encoded), MAX_LENGTH), np.float32)
    for n in range(len(encoded)):
        tokens = encoded.tokens(n)
        ids[n, : len(tokens)], mask[n, : len(tokens)] = tokens, 1
    return ids, mask


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the runs of a folder of sweeps; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.analysis.forgotten",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a sweep's workdir, or a folder of them")
    parser.add_argument(
        "--arm", action="append", metavar="NAME", help="only this arm; may be repeated"
    )
    options = parser.parse_args(argv)
    try:
        print(f"{measure(options.folder, options.arm)} runs measured")
    except RequestError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
