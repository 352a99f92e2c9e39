"""The weights of a streamed model that a few tokens use: rows of embeddings, non-expert weights, chosen experts.

Every tensor keeps its shape and its place in the model, so that the model's own modules, adapters and ops compute with
true token ids and expert numbers. A tensor of all experts, or of all tokens, is memory without pages, of which rows are
filled as they are used; rows that no token uses stay zeros, which take no memory.
"""

import mmap
import re
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from sedetect.adapters.forwards import forward_of, replace_forward
from sedetect.adapters.listed import ListedExperts
from sedetect.adapters.stacked import DbrxExperts
from sedetect.checkpoints.memory import size
from sedetect.checkpoints.source import Source
from sedetect.checkpoints.staging import StoredTensor
from sedetect.errors import SedetectError
from sedetect.models.banks import Bank
from sedetect.models.identity import named_weights
from sedetect.models.streamed import StreamedModel, give_back_freed_memory, parents, to_meta
from sedetect.stats.place import BankId

# Tensors with rows of all experts, by their names in the module that has them.
_STACKED = re.compile(
    r"(?:gate_up|gate|up|down)_proj(?:_bias|_scale_inv)?|(?:input|output)_linear\.weight|fc[12]\.weight|mlp\.(?:w1|v1|w2)"
)
_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_NORESERVE = 0x4000  # of mmap on Linux, where it is not named: memory counts as it is written


class _Experts(NamedTuple):
    """The weights of one bank's experts, in the checkpoint and in the model.

    own      of each expert, the tensors in the checkpoint that are its alone
    together tensors in the checkpoint with rows of all experts
    stacks   names in the model of tensors with rows of all experts, and how many rows each expert has; none of experts
             that are modules
    modules  paths in the model of experts that are modules
    """

    own: dict[int, list[str]]
    together: list[str]
    stacks: dict[str, int]
    modules: list[str]

    @property
    def keys(self) -> list[str]:
        return [*self.together, *(key for keys in self.own.values() for key in keys)]


class ChosenWeights:
    """Loads of a streamed model what is used, from a source, and the rows of its embeddings by itself.

    close() gives the embeddings their own forwards back. Raises SedetectError, naming the weight, where one cannot be
    made from the checkpoint.
    """

    def __init__(self, streamed: StreamedModel, banks: list[Bank], source: Source):
        self._streamed, self._source = streamed, source
        self._paths = {id(module): path for path, module in streamed.model.named_modules()}
        self._undo = ExitStack()
        self._experts = {bank.id: bank.experts for bank in banks}
        self._loaded: set[tuple[BankId, int]] = set()
        self._layers: list[dict[BankId, _Experts]] = [{} for _ in streamed.layers]
        for bank in banks:
            layer = next(n for n, path in enumerate(streamed.paths) if bank.path.startswith(f"{path}."))
            if bank.id.routed and (found := self._find(layer, bank)) is not None:
                self._layers[layer][bank.id] = found

    def close(self) -> None:
        self._undo.close()

    def load_rest(self) -> None:
        """Load what is outside the layers and runs on text, but for embeddings, whose rows come as they are used."""
        streamed = self._streamed
        model, runs = streamed.model, named_weights(streamed.model)
        tied = {**model.all_tied_weights_keys, **{b: a for a, b in model.all_tied_weights_keys.items()}}
        by_target: dict[str, list[str]] = {}
        for key in streamed.rest:
            by_target.setdefault(streamed.targets[key], []).append(key)
        head = model.get_output_embeddings()
        own = {id(parameter) for parameter in head.parameters()} if head is not None else set()
        skipped = {name for name, weight in runs.items() if id(weight.tensor) in own}
        inside = tuple(f"{path}." for path in streamed.paths)
        for path, module in model.named_modules():
            name = f"{path}.weight"
            if isinstance(module, nn.Embedding) and not name.startswith(inside):
                keys = by_target.get(name) or by_target.get(tied.get(name, ""), [])
                if len(keys) == 1 and streamed.rest[keys[0]].shape == tuple(module.weight.shape):
                    skipped.add(name)
                    rows = _Rows(module, streamed.rest[keys[0]], self._source)
                    self._undo.callback(replace_forward(module, rows))
                else:
                    skipped.discard(name)  # tied to an output embedding
        wanted = runs.keys() - skipped
        used = {key: tensor for key, tensor in streamed.rest.items() if streamed.targets[key] in wanted}
        streamed.convert(self._source.tensors(used))

    def common(self, layer: int) -> dict[str, StoredTensor]:
        """The tensors of a layer that every token uses."""
        later = {key for one in self._layers[layer].values() for key in one.keys}
        return {key: tensor for key, tensor in self._streamed.stored[layer].items() if key not in later}

    def bytes_of(self, layers: int, chosen: int) -> tuple[int, int]:
        """Bytes in the checkpoint of what every token uses of the first layers, and of so many experts of each."""
        stored = self._streamed.stored[:layers]
        common = sum(tensor.nbytes for layer in range(layers) for tensor in self.common(layer).values())
        experts = 0
        for layer, tensors in enumerate(stored):
            for bank, one in self._layers[layer].items():
                whole = sum(tensors[key].nbytes for key in one.keys)
                experts += whole * min(chosen, self._experts[bank]) // self._experts[bank]
        return common, experts

    def read(self, layer: int) -> dict[str, torch.Tensor]:
        """The tensors of a layer that every token uses. May run in a thread beside a forward."""
        return self._source.tensors(self.common(layer))

    def load(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        """Make the weights of a layer, without its experts, from the tensors that read returned."""
        info = self._streamed.convert(tensors)
        apart: tuple[str, ...] = ()
        for one in self._layers[layer].values():
            apart += tuple(f"{path}." for path in one.modules)
            for name in one.stacks:
                self._put(name, _without_pages(self._get(name)))
        path = self._streamed.paths[layer]
        state = self._streamed.layers[layer].state_dict(keep_vars=True)
        names = (f"{path}.{name}" for name, tensor in state.items() if tensor.is_meta)
        self._streamed.check(layer, info, [name for name in names if not name.startswith(apart or "\0")])

    def choose(self, layer: int, bank: BankId, experts: Iterable[int]) -> None:
        """Load these experts of a bank, unless they are there; numbers that are no expert's are passed over."""
        one = self._layers[layer].get(bank)
        if one is None:  # loaded with the layer
            return
        new = [e for e in sorted(set(experts)) if 0 <= e < self._experts[bank] and (bank, e) not in self._loaded]
        if not new:
            return
        stored, count = self._streamed.stored[layer], self._experts[bank]
        wanted = {key: stored[key] for e in new for key in one.own.get(e, ())}
        for key in one.together:
            rows = stored[key].shape[0] // count
            wanted |= {f"{key}\0{e}": stored[key].rows(e * rows, rows) for e in new}
        read = self._source.tensors(wanted)
        for key in one.together:
            read[key] = torch.cat([read.pop(f"{key}\0{e}") for e in new])
        whole = {name: self._get(name) for name in one.stacks}
        for name, rows in one.stacks.items():  # the conversion makes tensors of these experts alone
            shape = (len(new) * rows, *whole[name].shape[1:])
            self._put(name, torch.empty(shape, dtype=whole[name].dtype, device="meta"))
        info = self._streamed.convert(read)
        made = {name: self._get(name) for name in one.stacks}
        self._streamed.check(layer, info, [name for name, tensor in made.items() if tensor.is_meta])
        for name, rows in one.stacks.items():
            for e, part in zip(new, made[name].split(rows), strict=True):
                whole[name][e * rows : (e + 1) * rows] = part
            self._put(name, whole[name])
        self._loaded |= {(bank, e) for e in new}

    def free(self, layer: int) -> None:
        """Free the weights of a layer."""
        to_meta(self._streamed.layers[layer])
        self._loaded = {(bank, e) for bank, e in self._loaded if bank not in self._layers[layer]}
        give_back_freed_memory()

    def _find(self, layer: int, bank: Bank) -> _Experts | None:
        """The place of a bank's experts; None if they cannot be told apart and are loaded with the layer."""
        targets = {key: self._streamed.targets[key] for key in self._streamed.stored[layer]}
        if isinstance(bank.module, ListedExperts):
            paths = [self._paths[id(expert)] for expert in bank.module.experts]
            number = {path: e for e, path in enumerate(paths)}
            own: dict[int, list[str]] = {e: [] for e in range(len(paths))}
            for key, target in targets.items():
                if (path := next((p for p in parents(target) if p in number), None)) is not None:
                    own[number[path]].append(key)
            return _Experts(own, [], {}, paths) if all(own.values()) else None
        root = f"{self._paths[id(bank.stored_in)]}."
        stacks = {
            root + name: tensor
            for name, tensor in bank.stored_in.state_dict(keep_vars=True).items()
            if _STACKED.fullmatch(name)
        }
        own, together = {}, []
        for target in stacks:
            keys = [key for key, made in targets.items() if made == target]
            if (numbered := _by_number(keys, bank.experts)) is not None:
                for e, named in numbered.items():
                    own.setdefault(e, []).extend(named)
            elif all(self._has_rows(bank, self._streamed.stored[layer][key]) for key in keys):
                together += keys
            else:
                return None
        rows = {}
        for name, tensor in stacks.items():
            rows[name] = tensor.shape[0] // bank.experts if isinstance(bank.module, DbrxExperts) else 1
            if tensor.shape[0] < bank.experts * rows[name]:
                return None
        return _Experts(own, together, rows, []) if own or together else None

    @staticmethod
    def _has_rows(bank: Bank, stored: StoredTensor) -> bool:
        """Whether a stored tensor has as many rows of every expert, one after another."""
        if not stored.shape:
            return False
        if isinstance(bank.module, DbrxExperts):  # whose matrices stand one below the other
            return stored.shape[0] % bank.experts == 0
        return stored.shape[0] == bank.experts

    def _get(self, name: str) -> torch.Tensor:
        path, _, own = name.rpartition(".")
        return getattr(self._streamed.model.get_submodule(path), own)

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        path, _, own = name.rpartition(".")
        module = self._streamed.model.get_submodule(path)
        module._parameters[own] = nn.Parameter(tensor, requires_grad=False)


class _Rows:
    """The forward of an embedding whose table has the rows alone that were looked up."""

    def __init__(self, module: nn.Embedding, stored: StoredTensor, source: Source):
        self._module, self._stored, self._source = module, stored, source
        self._own = forward_of(module)
        self._there: set[int] = set()
        module.weight = nn.Parameter(_without_pages(module.weight), requires_grad=False)

    def __call__(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        new = [row for row in ids.unique().tolist() if row not in self._there and 0 <= row < len(self._module.weight)]
        for row, read in self._source.tensors({str(row): self._stored.rows(row, 1) for row in new}).items():
            self._module.weight[int(row)] = read[0]
        self._there.update(new)
        return self._own(ids, *args, **kwargs)


def _by_number(keys: list[str], experts: int) -> dict[int, list[str]] | None:
    """The keys of each of so many experts, by the one number in which they differ; None where it does not tell."""
    numbers = [_NUMBER.findall(key) for key in keys]
    if len({len(one) for one in numbers}) != 1:
        return None
    differing = [place for place, values in enumerate(zip(*numbers)) if len(set(values)) > 1]
    if len(differing) != 1:
        return None
    found: dict[int, list[str]] = {}
    for key, one in zip(keys, numbers):
        found.setdefault(int(one[differing[0]]), []).append(key)
    return found if sorted(found) == list(range(experts)) else None


def _without_pages(like: torch.Tensor) -> torch.Tensor:
    """Zeros of another tensor's shape and type, which take memory where they are written."""
    count = like.numel() * like.element_size()
    if not count:
        return torch.zeros(like.shape, dtype=like.dtype)
    options = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE} if sys.platform == "linux" else {}
    try:
        memory = mmap.mmap(-1, count, **options)
    except OSError as error:
        raise SedetectError(
            f"{size(count)} of addresses cannot be had ({error.strerror}), of which a part is used; raise the limit on "
            "virtual memory (ulimit -v, vm.overcommit_memory)"
        ) from None
    return torch.frombuffer(memory, dtype=torch.uint8).view(like.dtype).reshape(like.shape)
