"""Damages copies of real folders and gives each to every command that reads it."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import random
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_jax.cli.main import main
from tests.hostile.folders import settings
from tests.hostile.mutations import SCALARS, TREES, mutate

SECONDS = 5
WARNING = "lora-jax: warning: "
TOO_LONG = f"more than {SECONDS} s"
# Escape codes and other controls that a terminal acts on.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class TooLong(BaseException):
    """The alarm; no Exception, so that nothing on the way takes it for its own."""


# Places: "{w}" is the damaged copy, "{o}" an empty folder, "{settings}" the config's flags.
TALK = ("--prompt=the film", "--max-new-tokens=2")
COMMANDS = {
    "report": ("report", "{w}", "--out={o}"),
    "export": ("report", "{w}", "--out={o}", "--json", "--keep={o}/kept", "--figures={o}/f"),
    "cite": ("cite", "{w}"),
    "cite one": ("cite", "{w}/cells/run"),
    "evaluate": ("evaluate", "{w}"),
    "texts": ("evaluate", "{w}", "--texts=1", "--max-new-tokens=2"),
    "merge": ("merge", "{w}", "--out={o}/m"),
    "convert": ("convert", "{w}", "--out={o}/c"),
    "inspect": ("inspect", "{w}"),
    "analyze": ("analyze", "{w}", "--out={o}"),
    "verify": ("verify", "{w}", "--no-progress"),
    "verify one": ("verify", "{w}/cells/r1", "--no-progress"),
    "generate": ("generate", "--adapter={w}", *TALK),
    "train": ("train", "{settings}", "--workdir={w}", "--no-progress"),
    "status": ("sweep", "--status", "--workdir={w}"),
    "status as json": ("sweep", "--status", "--workdir={w}", "--json"),
    "plan": ("sweep", "{settings}", "--sweep=two", "--workdir={w}", "--plan"),
    "sweep": ("sweep", "{settings}", "--sweep=two", "--workdir={w}", "--no-progress"),
    "merge peft": ("merge", "{w}", "--model={base}", "--out={o}/m"),
    "merge onto": ("merge", "{peft}", "--model={w}", "--out={o}/m"),
    "convert peft": ("convert", "{w}", "--model={base}", "--out={o}/c"),
    "analyze peft": ("analyze", "{w}", "--base={base}", "--out={o}"),
    "generate peft": ("generate", "--model={base}", "--adapter={w}", *TALK),
    "generate from": ("generate", "--model={w}", *TALK),
    "inspect config": ("inspect", "{settings}", "--config.model.name={w}"),
    "train on": ("train", "{settings}", "--config.model.name={w}", "--workdir={o}/r",
                 "--no-progress"),
}  # fmt: skip
# Those that load a run's adapter do it in one way, and take long where nothing is wrong: a mutation
# gets FEW of them.
SLOW = {
    "evaluate", "texts", "merge", "convert", "inspect", "analyze", "verify", "verify one",
    "generate", "train", "sweep", "plan", "merge peft", "convert peft", "analyze peft",
    "generate peft", "generate from", "merge onto", "train on",
}  # fmt: skip
FEW = 2

_LOADING = ("evaluate", "merge", "convert", "inspect", "analyze", "verify", "generate")
_TALKING = ("generate", "evaluate", "texts", "merge")
_SUMMARIES = ("report", "cite")


@dataclasses.dataclass(frozen=True)
class Case:
    """A folder to damage, and what in it, with the names of the commands that read that."""

    folder: str
    files: Mapping[str, tuple[str, ...]]
    weight: int


CASES = {
    "run": Case("run", {
        "cells/run/card.json": ("report", "export", "cite one", "train", *_LOADING),
        "cells/run/config.json": ("report", "evaluate", "train", "cite"),
        "cells/run/metrics.jsonl": ("report", "export", "cite"),
        "cells/run/adapter": _LOADING,
        "cells/run/adapter/method.json": _LOADING,
        "cells/run/adapter/trainable.safetensors": _LOADING,
        "cells/run/test_predictions.npz": ("report", "export", "verify"),
        "cells/run": ("report", "cite", "train", *_LOADING),
    }, 7),
    "begun": Case("begun", {
        "cells/run/config.json": ("train", "report", "evaluate"),
        "cells/run/metrics.jsonl": ("train", "report"),
        "cells/run/checkpoints": ("train",),
        "cells/run/checkpoints/4/_CHECKPOINT_METADATA": ("train",),
        "cells/run/checkpoints/4/facts/metadata": ("train",),
        "cells": ("train", "report"),
        ".lock": ("train",),
    }, 3),
    "sweep": Case("sweep", {
        "sweep.json": ("status", "status as json", "plan", "sweep"),
        "packs/*/pack.json": ("plan", "sweep"),
        "cells/r2/card.json": ("status", "report", "cite", "plan", "sweep", "verify one"),
        "cells/r2/config.json": ("status", "sweep"),
        "cells/r2/metrics.jsonl": ("status", "report", "status as json"),
        "cells/r1/card.json": ("verify one", "status"),
    }, 7),
    "begun_sweep": Case("begun_sweep", {
        "sweep.json": ("status", "plan", "sweep"),
        "packs/*/pack.json": ("plan", "sweep"),
        "packs/*/checkpoints": ("sweep",),
        "packs": ("plan", "sweep"),
        "cells/r1": ("status", "sweep", "report"),
        "cells/r1/metrics.jsonl": ("status", "sweep"),
        "cells/r1/config.json": ("status", "sweep", "report"),
    }, 4),
    "peft": Case("peft", {
        "adapter_config.json": ("merge peft", "convert peft", "analyze peft", "generate peft",
                                "evaluate", "merge"),
        "adapter_model.safetensors": ("merge peft", "convert peft", "analyze peft",
                                      "generate peft"),
    }, 7),
    "model": Case("model", dict.fromkeys(
        ("tokenizer.json", "config.json", "model.safetensors", "generation_config.json"),
        ("generate from", "merge onto")), 5),
    "encoder": Case("encoder", dict.fromkeys(
        ("tokenizer.json", "config.json", "model.safetensors", "head.safetensors",
         "1_Pooling/config.json"), ("inspect config", "train on")), 3),
    "pairs": Case("pairs", {
        "cells/run/card.json": _SUMMARIES + _TALKING,
        "cells/run/config.json": ("evaluate", "texts"),
        "cells/run/adapter/method.json": _TALKING,
        "cells/run/adapter/trainable.safetensors": _TALKING,
        "cells/run/metrics.jsonl": ("report",),
        "cells/run/test_predictions.npz": ("report",),
    }, 3),
}  # fmt: skip


@dataclasses.dataclass
class Fuzzer:
    """Mutations of the folders in `home`; `fallen` lists what broke a property."""

    home: Path
    fallen: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.work, self.out = self.home / "work", self.home / "out"
        self.outside = self.home / "outside"
        self.outside.mkdir(exist_ok=True)
        for name in ("precious", "precious.json"):
            (self.outside / name).write_text('{"precious": 1}')
        os.chdir(self.outside)
        self.before = self.listing()

    def listing(self) -> dict[str, tuple]:
        """Everything outside the damaged folder and the place for results, as it is."""
        found = {}
        for folder, folders, files in os.walk(self.home):
            if folder == str(self.home):
                folders[:] = [name for name in folders if name not in ("work", "out")]
            for name in files:
                path = os.path.join(folder, name)
                stat = os.lstat(path)
                found[path] = (stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_mode)
        return found

    def case(self, name: str, seed: int, capture) -> None:
        """One mutation of the case, read by its commands."""
        rng, case = random.Random(f"{name} {seed}"), CASES[name]
        with self.copy(self.home / case.folder):
            pattern = rng.choice(list(case.files))
            path = sorted(self.work.glob(pattern))[0]
            what = f"{name} {seed}: {path.relative_to(self.work)} {mutate(path, self.outside, rng)}"
            slow = [command for command in case.files[pattern] if command in SLOW]
            slow = rng.sample(slow, min(FEW, len(slow)))
            for command in case.files[pattern]:
                if command not in SLOW or command in slow:
                    self.command(COMMANDS[command], what, capture)

    def warm_up(self, capture, name: str) -> None:
        """Every command of a case on its undamaged folder: what must be compiled is not timed."""
        if name == "flags":
            return
        case = CASES[name]
        for command in dict.fromkeys(c for some in case.files.values() for c in some):
            with self.copy(self.home / case.folder):
                self.command(COMMANDS[command], f"undamaged {case.folder}", capture)
        self.fallen = [one for one in self.fallen if TOO_LONG not in one]

    def flags(self, seed: int, capture) -> None:
        """One value of the config replaced, by a flag or in its file."""
        rng = random.Random(f"flags {seed}")
        with self.copy(None):
            key = rng.choice(KEYS)
            value = rng.choice((*SCALARS, *TREES))
            args = settings(self.home)
            if rng.random() < 0.5:
                args.append(f"--config.{key}={value}")
            else:
                text = (self.home / "config.py").read_text()
                line = f"    config.{key} = {value!r}\n    return config\n"
                for special in ("nan", "inf"):
                    line = re.sub(rf"(?<![\w'\"]){special}(?![\w'\"])", f"float('{special}')", line)
                self.work.mkdir()
                (self.work / "config.py").write_text(
                    text.replace("    return config\n", line), errors="backslashreplace"
                )
                args[0] = args[0].replace(f"{self.home}/config.py", f"{self.work}/config.py")
            what = f"flags {seed}: {key}={value!r:.60} {args[0]}"
            for command in (
                ("inspect", *args),
                ("train", *args, "--workdir={o}/r", "--no-progress"),
            ):
                self.command(command, what, capture)

    @contextlib.contextmanager
    def copy(self, folder: Path | None) -> Iterator[None]:
        for path in (self.work, self.out):
            shutil.rmtree(path, ignore_errors=True)
        self.out.mkdir()
        if folder is not None:
            shutil.copytree(folder, self.work, symlinks=True)
        yield

    def command(self, command: tuple[str, ...], what: str, capture) -> None:
        """Runs it; notes what is neither a success nor one line on stderr."""
        places = {"w": self.work, "o": self.out, "base": self.home / "base",
                  "peft": self.home / "peft"}  # fmt: skip
        argv = []
        for word in command:
            if word == "{settings}":
                argv += settings(self.home)
            else:
                for name, path in places.items():
                    word = word.replace(f"{{{name}}}", str(path))
                argv.append(word)
        capture.readouterr()
        fault, code = "", None
        with alarm():
            try:
                code = main(argv)
            except TooLong:
                fault = TOO_LONG
                fault += "".join(traceback.format_exc().splitlines(True)[-12:])
            except SystemExit as ended:
                code = ended.code
            except BaseException:
                fault = traceback.format_exc()
        seen = capture.readouterr()
        fault = fault or self.faults_of(code, seen)
        if self.listing() != self.before:
            changed = self.listing().items() ^ self.before.items()
            fault += f" touched outside: {sorted({path for path, _ in changed})[:5]}"
            self.before = self.listing()
        if fault:
            self.fallen.append(f"{what} | {' '.join(argv[:1])} | {' '.join(command)} | {fault}")

    @staticmethod
    def faults_of(code, seen) -> str:
        said = [line for line in seen.err.splitlines() if not line.startswith(WARNING)]
        if CONTROL.search(seen.err) or CONTROL.search(seen.out):
            return f"control characters: {CONTROL.findall(seen.err + seen.out)[:5]}"
        if "Traceback" in seen.err or "panicked" in seen.err:
            return f"a traceback on stderr: {seen.err[:2000]}"
        if code not in (0, 1, 2):
            return f"exit code {code}"
        if code == 2 and not (said and said[-1].startswith("lora-jax: ")):
            return f"the last line is no error: {said[-2:]}"
        if code == 2 and sum(line.startswith("lora-jax: ") for line in said) != 1:
            return f"several errors: {said}"
        return ""


KEYS = (
    "seed", "model.name", "model.num_labels", "model.dtype", "model.quantize", "data.source",
    "data.path", "data.text", "data.label", "data.max_length", "data.buckets", "data.batch_size",
    "data.seed", "data.limit", "method.name", "method.targets", "method.rank", "method.alpha",
    "method.dropout", "method.init", "method.train", "optimizer.lr", "optimizer.schedule",
    "optimizer.warmup_ratio", "optimizer.weight_decay", "optimizer.beta1", "optimizer.beta2",
    "optimizer.eps", "optimizer.clip_norm", "train.num_epochs", "train.num_steps",
    "train.label_smoothing", "train.eval_every_steps", "train.checkpoint_every_steps",
    "train.patience", "train.eval_batch_size", "train.log_every_steps", "train.accumulate_steps",
    "train.remat", "train.loss_chunk", "optimizer.moment_dtype", "optimizer.offload",
)  # fmt: skip


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    """Raises `TooLong` after SECONDS of the processor's time, or six times that of waiting.

    What no signal stops ends the process, with a traceback.
    """

    def ring(*_):
        raise TooLong

    clocks = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, ring) for number in clocks}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
    faulthandler.dump_traceback_later(60 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        for number, clock in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])
        faulthandler.cancel_dump_traceback_later()
