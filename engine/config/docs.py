"""The page and the JSON Schema that describe a config, written from the models themselves."""

import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from magnetar.engine.config.deepspeed import DeepSpeedKeys
from magnetar.engine.config.errors import expected, joined, section_model, shown
from magnetar.engine.config.refused_keys import REFUSED
from magnetar.engine.config.schema import ConfigFile, MagnetarConfig

SHIPPED = {
    "quickstart.json": "Two layers and eight experts on a small corpus, for two CPU ranks.",
    "translate_demo.json": "Translation of short verses, likewise, for `make translate-demo`.",
    "lm_dense.json": "The TorchScale paper's language model without experts: 12 layers.",
    "lm_dense_24.json": "The same with 24 layers.",
    "lm_dense_48.json": "The same with 48 layers.",
    "lm_dense_96.json": "The same with 96 layers.",
    "lm_xmoe.json": "The paper's sparse model: every second of 12 layers has 64 experts.",
    "lm_xmoe_16.json": "The same with 16 experts.",
    "lm_xmoe_256.json": "The same with 256 experts, 13 billion parameters.",
    "xmoe_256_one_gpu.json": "The model of `lm_xmoe_256.json` on one GPU of 141 GB, for 20 steps.",
    "subln_200.json": "200 Sub-LN layers, 64 wide, for 100 steps: depth, not language.",
    "deepnorm_1000.json": "1,000 DeepNorm layers, likewise.",
    "mlm_dense.json": "A masked language model: an encoder of 12 layers, 768 wide.",
    "mlm_xmoe.json": "The same with the X-MoE paper's router and its 32 experts.",
    "mt_dense.json": "Translation between many languages: an encoder and a decoder of 6 layers.",
    "mt_dense_12.json": "The same with 12 layers each.",
    "mt_dense_24.json": "The same with 24 layers each.",
    "mt_xmoe.json": "`mt_dense.json` with 16 experts in every second layer, at its FLOPs.",
    "mt_xmoe_32.json": "The same with 32 experts.",
    "mt_xmoe_64.json": "The same with 64 experts.",
    "mt_xmoe_128.json": "The same with 128 experts.",
}

_INTRODUCTION = """\
# Configs

*Written by `magnetar config docs` from the models in `engine/` and `models/`; change
those, not this page.*

A run is one JSON file. It is a DeepSpeed config, so all that you know about DeepSpeed's keys holds,
plus one top-level key, `magnetar`, which says what the model is, what it reads and how long it
trains. The file is read once, before any process starts to talk to another, and every key is
checked: an unknown key, a key given twice, a value of the wrong type or two keys that contradict
each other end the run with a list of all that is wrong and a way out for each.

```bash
magnetar config check ds_configs/quickstart.json --world-size 2
```

prints the resolved file, with every default filled in, or the list.

## A minimal config

```json
{example}
```

`"$schema"` is for your editor: with it, VS Code and others complete and explain the keys. Magnetar
ignores it.

## Changing a value for one run

`--set path=value` replaces a value, and may be given as often as you like:

```bash
magnetar config check ds_configs/quickstart.json \\
    --set magnetar.model.num_layers=4 --set zero_optimization.stage=2 --set magnetar.model.moe=null
```

The path is the keys joined by dots, for DeepSpeed's keys as well. The value is read as JSON; what
is not JSON is taken as text, so `--set magnetar.training.run_dir=runs/wide` needs no quotes.
Objects on the way are created. A list is set as a whole:
`--set 'optimizer.params.betas=[0.9,0.95]'`.

## Batch sizes

`train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * ranks`. Give
`train_batch_size` and, when memory is short, `train_micro_batch_size_per_gpu`: the file then works
on any number of ranks that divides. With MoE layers the balance loss, and the capacity of dispatch
`capacity`, are those of an accumulation step over all ranks, so runs give the same numbers where
`gradient_accumulation_steps` is the same: give that in place of the micro-batch to train in several
layouts. `magnetar.model.moe.balance_scope` "batch" with dispatch `dropless` frees it.

## The configs here

{shipped}

Only the `lm_` configs are wholly the TorchScale paper's (arXiv 2211.13184). They follow its
appendix: 2048 sequences of 128 tokens a step, 50,000 steps, Adam with betas 0.9 and 0.98, learning
rate 5e-4 with 750 steps of warm-up and linear decay, dropout 0.1, weight decay 0.01, GPT-2's
vocabulary (50,257 tokens, padded to 50,304 for speed). The sparse ones have `capacity` dispatch
with factor 1.0, which gives each expert room for 2 * tokens / experts tokens, as in the paper's
code. The paper does not give its threshold for clipping; 1.0 is ours.

The sparse `lm_` configs and `mlm_xmoe.json` have `ep_size` 8 and need a multiple of 8 ranks. A
smaller one, `--set magnetar.model.moe.ep_size=2` say, needs fewer, with more experts on each.

The `mlm_` configs have the size of the X-MoE paper's encoders (arXiv 2204.09179): 12 layers,
d_model 768, 12 heads, d_ff 3072; the sparse one also its 32 experts and its router, 16 wide. Where
the MoE layers stand, how many tokens are masked and all that concerns the optimizer is ours, in the
usual range of such models. The data, `prepared/multilingual`, is yours to bring.

The `mt_` configs have the paper's settings for translation (Adam with betas 0.9 and 0.98, learning
rate 5e-4 after the inverse square root of the step, label smoothing 0.1, dropout 0.1, no weight
decay, clipping at 1.0) at a size for one GPU and a corpus of a million words a language: half its
width, 65,536 places a step in place of 262,144 tokens, 4,000 steps of warm-up in place of 6,000.
Each token goes to one expert as wide as the dense network, so that `mt_xmoe.json` has the FLOPs of
`mt_dense.json`. The data, `prepared/bible`, is a folder that `magnetar prepare-pairs` has made:
[docs/translation.md](../docs/translation.md).

`xmoe_256_one_gpu.json` shows that the largest model trains on a single GPU, with 8-bit states, no
accumulation and no checkpoint at the end; [benchmarks/](../benchmarks/README.md) has its memory.

`subln_200.json` and `deepnorm_1000.json` try how deep a model trains; what came out is in
[experiments/](../experiments/README.md). Their data is the State of the Union speeches in a
vocabulary of 400 pieces:

```bash
magnetar prepare --corpus sotu --vocab-size 400 --out prepared/sotu_400
```
"""

_REFUSED_INTRODUCTION = """\
## DeepSpeed's keys that are refused

DeepSpeed knows these too. They would change the numbers, or do nothing, or they have not been shown
to work together with experts and SparseClip; a file that has one does not start. The first row has
keys of Magnetar's earlier versions; with their defaults such a file starts.

"""

_EXAMPLE = {
    "$schema": "./schema.json",
    "train_batch_size": 16,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.003}},
    "magnetar": {
        "model": {
            "num_layers": 2,
            "d_model": 128,
            "d_ff": 512,
            "num_heads": 4,
            "max_seq_len": 128,
            "moe": {"num_experts": 8},
        },
        "data": {"path": "prepared/sotu", "seq_len": 128},
        "training": {
            "run_dir": "runs/first",
            "num_steps": 400,
            "save_every": 100,
            "lr_schedule": {"type": "polynomial", "warmup_steps": 40},
        },
    },
}


def example_config() -> dict[str, Any]:
    """The page's minimal config."""
    return _EXAMPLE


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    """What an absent key means."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "all its defaults"
    return f"`{shown(list(value) if isinstance(value, tuple) else value)}`"


def _section(model: type[BaseModel], path: str) -> str:
    """The table of a section and of those below it."""
    rows = []
    below = []
    for name, field in model.model_fields.items():
        if inner := section_model(field.annotation):
            below.append((joined(path, name), inner))
        kind = expected(field).removeprefix("a ").replace("an object, { ... }", "section")
        rows.append((f"`{name}`", kind, _default(field), field.description or ""))
    title = f"### `{path}`\n\n{model.__doc__}\n\n" if path else ""
    parts = [title + _table(("key", "type", "default", "meaning"), rows)]
    return "\n\n".join(parts + [_section(inner, inner_path) for inner_path, inner in below])


def _refused_rows() -> list[tuple[str, str]]:
    """The refused keys that share a reason, and the reason."""
    keys: dict[str, list[str]] = {}
    for key, reason in REFUSED.items():
        keys.setdefault(reason, []).append(f"`{key}`")
    return [(", ".join(names), reason) for reason, names in keys.items()]


def readme() -> str:
    """The page of every key, in Markdown."""
    introduction = _INTRODUCTION.replace("{example}", json.dumps(_EXAMPLE, indent=2)).replace(
        "{shipped}",
        _table(("file", "what it trains"), [(f"[{k}]({k})", v) for k, v in SHIPPED.items()]),
    )
    parts = [
        introduction,
        "## Magnetar's keys\n\n" + _section(MagnetarConfig, "magnetar"),
        "## DeepSpeed's keys\n\n" + _section(DeepSpeedKeys, ""),
        _REFUSED_INTRODUCTION + _table(("keys", "why, and what to do"), _refused_rows()),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _without_titles(node: Any, in_properties: bool = False) -> Any:
    """The schema without the titles that pydantic makes up from the names."""
    if isinstance(node, dict):
        return {
            key: _without_titles(value, key == "properties" and not in_properties)
            for key, value in node.items()
            if key != "title" or in_properties
        }
    return [_without_titles(value) for value in node] if isinstance(node, list) else node


def schema() -> dict[str, Any]:
    """The JSON Schema of a whole file."""
    found = _without_titles(ConfigFile.model_json_schema())
    found["properties"] = {
        "$schema": {"type": "string", "description": "For editors; ignored."},
        **found["properties"],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def generated_files() -> dict[str, str]:
    """The text of each generated file of ds_configs/, by name."""
    return {"README.md": readme(), "schema.json": json.dumps(schema(), indent=2) + "\n"}
