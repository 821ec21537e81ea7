"""Works with every method in a process of its own, under the settings of JAX it is started with.

`run_grid WORKDIR CONFIGS begin` trains each config twice, the second time stopped on the way, and
writes what the finished cells merge to in WORKDIR/default.json.
`run_grid WORKDIR CONFIGS FOLDER` goes on from copies of these and writes FOLDER/found.json.
"""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core.errors import RequestError
from lora_jax.core.hashes import hash_params
from lora_jax.core.trees import flatten
from lora_jax.data import TrainIterator
from lora_jax.settings import Settings
from lora_jax.sweeps.verify import verify
from lora_jax.train import Interrupted, train
from lora_jax.train.adapted import load_run_adapter as load_adapter
from lora_jax.train.evaluate_run import evaluate_cell
from tests.train.results import digest
from tests.train.test_resume import at_call, interrupt


def begin(workdir: Path, configs) -> None:
    found = {}
    for name, config in configs.items():
        train(config, workdir / "whole", name, progress=False)
        with pytest.MonkeyPatch.context() as patch:
            at_call(patch, TrainIterator, "__next__", 4, interrupt)
            with pytest.raises(Interrupted):
                train(config, workdir / "stopped", name, progress=False)
        found[name] = used(workdir / "whole" / "cells" / name)
    (workdir / "default.json").write_text(json.dumps(found))


def go_on(workdir: Path, configs, folder: Path) -> None:
    shutil.copytree(workdir / "stopped", folder / "stopped")
    found = {}
    for name, config in configs.items():
        whole, resumed = workdir / "whole" / "cells" / name, folder / "stopped" / "cells" / name
        found[name] = {"whole": weights_of(whole), "fresh": fresh(config, folder, name)}
        try:
            train(config, folder / "stopped", name, progress=False)
            found[name]["resumed"] = weights_of(resumed)
        except RequestError as error:
            found[name]["refused"] = str(error)
        found[name] |= used(whole)
        (verdict,) = verify(whole, progress=False)
        found[name]["verified"] = [verdict.same, list(verdict.conditions)]
    (folder / "found.json").write_text(json.dumps(found))


def weights_of(cell: Path) -> str:
    return digest(cell / "adapter" / "trainable.safetensors")


def used(cell: Path) -> dict:
    """The finished cell bound, merged and evaluated."""
    adapted = load_adapter(cell / "adapter")
    merged = adapted.method.merge(adapted.trainable, adapted.frozen)
    ids = np.arange(2, 14, dtype=np.int32).reshape(2, 6)
    bound = adapted.method.bind(adapted.trainable, adapted.frozen)
    outputs = [
        np.asarray(apply(params, ids, np.ones_like(ids)), np.float32)
        for apply, params in ((lj.lift(adapted.model.apply), bound), (adapted.model.apply, merged))
    ]
    evaluation, _ = evaluate_cell(cell)
    return {
        "merged": hash_params(dict(flatten(merged).items())),
        "loss": evaluation.loss,
        "lifted": float(np.max(np.abs(outputs[0] - outputs[1]))),
    }


def fresh(config, folder: Path, name: str) -> str:
    train(config, folder / "fresh", name, progress=False)
    return weights_of(folder / "fresh" / "cells" / name)


def main(workdir: str, configs: str, what: str) -> None:
    configs = {
        name: Settings.from_config(config)
        for name, config in json.loads(Path(configs).read_text()).items()
    }
    if what == "begin":
        begin(Path(workdir), configs)
    else:
        Path(what).mkdir()
        go_on(Path(workdir), configs, Path(what))
    jax.effects_barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
