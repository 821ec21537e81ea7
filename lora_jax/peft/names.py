"""A model's modules as PEFT sees them: their names in transformers' classes, and our paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from lora_jax.models.families import CAUSAL_LM
from lora_jax.models.hf_names import Entry
from lora_jax.models.model import Model
from lora_jax.models.save import class_entries
from lora_jax.peft.config import PeftConfig

LINEAR, CONV1D, EMBEDDING = "linear", "conv1d", "embedding"
# The way out where a file has a head apart from the table that the model ties it to.
UNTIE = (
    "give the head a kernel of its own: load_model(…, untie=True), or --untie on the command line"
)


@dataclasses.dataclass(frozen=True)
class Module:
    """One module that can hold an adapter: `entry` is its weight's, `bias` its bias's, if any.

    `is_tied` says that transformers has two modules on this one parameter, of which this is one;
    `is_output` that it is the model's last layer.
    """

    name: str
    kind: str
    entry: Entry
    bias: Entry | None = None
    is_output: bool = False
    is_tied: bool = False


@dataclasses.dataclass(frozen=True)
class Names:
    """`modules` by name, and `tensors` by name: every parameter of the model with a tensor's name.

    Names are those of the class that transformers would load the model into: with the family's
    prefix where that has a head ("bert.encoder…", "classifier"), without it where it has none.
    `phantoms` are modules of that class which this model leaves out, since they cannot change what
    it gives.
    """

    modules: Mapping[str, Module]
    tensors: Mapping[str, Entry]
    prefix: str
    phantoms: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Model) -> Names:
        family = model.family
        entries, heads = class_entries(model)
        tensors = {entry.tensor: entry for entry in (*entries, *heads)}
        modules = {}
        is_tied = family.kind == CAUSAL_LM and model.head is None and not heads
        outputs = {e.tensor.rpartition(".")[0] for e in heads}
        for entry in tensors.values():
            kind = _kind_of(entry)
            name = entry.tensor.rpartition(".")[0]
            if kind is None:
                continue
            tied = is_tied and entry.path == "embed/embedding"
            bias = tensors.get(f"{name}.bias")
            modules[name] = Module(name, kind, entry, bias, name in outputs, tied)
        if is_tied:
            table = next(e for e in entries if e.path == "embed/embedding")
            modules["lm_head"] = Module("lm_head", LINEAR, table, None, True, True)
        bare = family.kind != CAUSAL_LM and not heads
        has_pooler = any(name.endswith("pooler.dense") for name in modules)
        phantoms = ("pooler.dense",) if bare and not has_pooler else ()
        return cls(modules, tensors, family.prefix, phantoms)

    def targeted(self, config: PeftConfig, view: View) -> list[str]:
        """The modules that PEFT would adapt by this config, in the model's own order."""
        return [
            name
            for name, module in self.modules.items()
            if config.targets(
                view.there(name), is_linear=module.kind != EMBEDDING, is_output=module.is_output
            )
        ]

    def view_of(self, modules: Iterable[str]) -> View:
        """How a file that names these modules writes names: as here, or with or without prefix."""
        known, modules = self.modules.keys(), list(modules)
        for cut, add in (("", ""), ("", self.prefix), (self.prefix, "")):
            view = View(cut, add)
            if any(view.here(module) in known for module in modules):
                return view
        return View("", "")


@dataclasses.dataclass(frozen=True)
class View:
    """The prefix that a file has and this model's names have not, and the other way round."""

    cut: str
    add: str

    def here(self, name: str) -> str:
        """A name in the file as `Names` has it."""
        if self.cut and not name.startswith(self.cut):
            return name
        name = name.removeprefix(self.cut)
        is_head = name.startswith(("lm_head", "score", "classifier"))
        return name if is_head else f"{self.add}{name}"

    def there(self, name: str) -> str:
        """A name of `Names` as the file has it."""
        is_head = name.startswith(("lm_head", "score", "classifier"))
        if is_head or (self.add and not name.startswith(self.add)):
            return name
        return f"{self.cut}{name.removeprefix(self.add)}"


def _kind_of(entry: Entry) -> str | None:
    if entry.path.endswith("/embedding"):
        return EMBEDDING
    if entry.path.endswith("/kernel"):
        return LINEAR if entry.is_transposed else CONV1D
    return None
