"""Run by itself where magnetar cannot be imported: what transformers makes of exported folders."""

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.modules["magnetar"] = None  # type: ignore[assignment]

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer


def causal(model: Any, rows: list[list[int]], num_tokens: int) -> dict[str, Any]:
    """Logits of rows padded on either side and alone, and greedy continuations."""
    longest = max(map(len, rows))
    found: dict[str, Any] = {"alone": [model(torch.tensor([row])).logits[0] for row in rows]}
    for side in ("left", "right"):
        pads = [[0] * (longest - len(row)) for row in rows]
        is_left = side == "left"
        pairs = list(zip(pads, rows, strict=True))
        ids = torch.tensor([pad + row if is_left else row + pad for pad, row in pairs])
        ones = [[1] * len(row) for row in rows]
        mask = [p + o if is_left else o + p for p, o in zip(pads, ones, strict=True)]
        mask = torch.tensor(mask)
        logits = model(input_ids=ids, attention_mask=mask).logits
        found[side] = [own[seen.bool()] for own, seen in zip(logits, mask, strict=True)]
        greedy = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
        if is_left:
            for name, more in (("tokens", {}), ("uncached", {"use_cache": False})):
                out = model.generate(ids, attention_mask=mask, **greedy, **more)
                found[name] = out[:, longest:].tolist()
            beams = [
                model.generate(ids, attention_mask=mask, num_beams=3, use_cache=use, **greedy)
                for use in (True, False)
            ]
            found["beams agree"] = torch.equal(*beams)
    return found


def seq2seq(model: Any, case: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    source, target = torch.tensor(case["source"]), torch.tensor(case["target"])
    mask = torch.tensor(case["source_mask"])
    logits = model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
    out = {"max_new_tokens": num_tokens, "pad_token_id": 0, "decoder_start_token_id": 1}
    tokens = model.generate(source, attention_mask=mask, **out)
    beams = [
        model.generate(source, attention_mask=mask, num_beams=3, use_cache=use, **out)
        for use in (True, False)
    ]
    agree = torch.equal(*beams)
    return {"logits": logits, "tokens": tokens[:, 1:].tolist(), "beams agree": agree}


def masked(model: Any, case: dict[str, Any]) -> dict[str, Any]:
    tokens, mask = torch.tensor(case["source"]), torch.tensor(case["source_mask"])
    return {"logits": model(input_ids=tokens, attention_mask=mask).logits}


@torch.no_grad()
def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for case in json.loads((folder / "cases.json").read_text()):
        path = folder / case["name"]
        (name,) = [
            key
            for key in AutoConfig.from_pretrained(path, trust_remote_code=True).auto_map
            if key != "AutoConfig"
        ]
        loader = getattr(transformers, name)
        model, info = loader.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys")), info
        model.eval()
        if name == "AutoModelForCausalLM":
            found[case["name"]] = causal(model, case["rows"], case["num_tokens"])
        elif name == "AutoModelForMaskedLM":
            found[case["name"]] = masked(model, case)
        else:
            found[case["name"]] = seq2seq(model, case, case["num_tokens"])
        if case.get("texts"):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
            ids = tokenizer(case["texts"])["input_ids"]
            back = [tokenizer.decode(row) for row in ids]
            found[case["name"]] |= {"ids": ids, "decoded": back, "eos": tokenizer.eos_token_id}
    torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
