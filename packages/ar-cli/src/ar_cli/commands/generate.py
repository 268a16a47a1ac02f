"""`ar generate`: run a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ar_cli.quiet import hush
from ar_schemes import ArError


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to go on from.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, help="0: greedy.")
@click.option("--seed", type=int, default=0, help="Of the sampling.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--dtype", default="auto", help="Type to compute in; default: as stored.")
@click.option("--device", default="cpu", show_default=True)
def generate(  # noqa: PLR0913
    directory: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    chat: bool,  # noqa: FBT001
    dtype: str,
    device: str,
) -> None:
    """Let the model in DIRECTORY go on from a prompt."""
    hush()
    from ar_cli.opening import open_model, open_tokenizer

    model: Any = open_model(directory, dtype, device=device)
    tokenizer = open_tokenizer(directory)
    import torch

    if chat:
        if not tokenizer.chat_template:
            msg = f"{directory} has no chat template; leave --chat out"
            raise ArError(msg)
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(device)
    if inputs.input_ids.shape[1] == 0:
        msg = "--prompt holds no text; give at least one word"
        raise ArError(msg)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature}
    with torch.inference_mode():
        out = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=max_new_tokens,
            **sampling,
        )
    click.echo(tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
