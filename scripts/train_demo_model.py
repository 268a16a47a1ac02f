"""Train the embedded demonstration model from the standard library's own documentation.

The text comes from the Python which runs this script: docstrings and comment blocks of the
standard library's modules, and the language topics behind ``help()``.  Nothing is downloaded.
Some modules are held out, and the model is kept where their perplexity was lowest.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import io
import json
import math
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import tokenize
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

END, PAD = "<|endoftext|>", "<|pad|>"
VOCAB = 3072  # tied embedding; keeps the bf16 file below 8 MB
# The split of Qwen2's tokenizer, so that every tool which knows Qwen3 knows this one.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HELD_OUT_PERCENT = 8
EVAL_BYTES, EVAL_MODULE_BYTES = 150_000, 12_000
CALIBRATION_BYTES, CALIBRATION_MODULE_BYTES = 400_000, 8_000
CALIBRATION_PIECES = (500, 4000, 1200, 2500, 800, 1800)  # lengths in characters, in turn
MIN_COMMENT = 30  # characters; shorter comments are mostly remarks without a context
STEP_TOKENS = 4096
# Sequence lengths in turn: mostly short, with enough long ones that RoPE has seen its whole range.
LENGTHS = (256, 512, 256, 256, 1024, 256, 512, 256)
EVAL_LENGTH, EVAL_ROWS, EVAL_EVERY = 512, 8, 100
WARMUP_STEPS, PEAK_RATE, FINAL_RATE, WEIGHT_DECAY = 60, 2e-3, 1e-4, 0.2

CARD = """\
---
license: psf-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# Embedded demonstration model

A small Qwen3 causal language model trained from scratch on the documentation strings of Python's
standard library.  It exists so that quantization can be shown and measured without a download; it
knows nothing but the manner of Python's documentation and is no source of facts.

| | |
|---|---|
| parameters | {parameters:,} (embedding tied), bf16 |
| tokenizer | byte-level BPE, {vocab} entries, trained on the same text |
| context | {context} tokens |
| training text | {tokens:,} tokens |
| steps | {steps} of {step_tokens} tokens: {trained:,} tokens, {epochs:.1f} epochs |
| weights of step | {step} (lowest held-out perplexity) |
| held-out perplexity | {perplexity:.3f} per token: bf16 weights, fp32 arithmetic, `eval.txt` in \
windows of {window} tokens ({held_out:,} tokens) |
| seed | {seed} |
| Python, torch, transformers | {python}, {torch}, {transformers} |

Training command, from the repository's root (the text is that of the Python which runs it):

```
python scripts/train_demo_model.py --steps {steps} --seed {seed} \\
  --output-model packages/ar-cli/src/ar_cli/demo/model \\
  --output-eval packages/ar-cli/src/ar_cli/demo/eval.txt \\
  --output-calibration packages/ar-tuner/src/ar_tuner/calibration/default.jsonl
```

The text is the docstrings, comment blocks and `help()` topics of CPython's standard library,
without its tests.  {percent} % of the modules, chosen by a hash of the name, are held out; a
paragraph is kept once, so none of the held-out ones was trained.

That text is Copyright the Python Software Foundation and its contributors, under the PSF License
Agreement (PSF-2.0); these weights and the text files beside them derive from it.
"""


# ---------------------------------------------------------------------------------------- text


def module_sources(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, source text) of the standard library under ``root``, sorted by path."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or {"test", "tests", "idle_test"} & set(parts):
            continue
        if "site-packages" in parts or parts[0] == "pydoc_data":
            continue
        try:
            yield ".".join(parts).removesuffix(".__init__"), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few old modules declare another encoding
            continue


def heading(node: ast.AST) -> str:
    """Return the line ``help()`` would put above a definition; empty for a module."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{node.name}({ast.unparse(node.args)})"
    return ""


def doc_items(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line, heading, docstring) of a module and of each documented definition in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 0), heading(node), text


def comment_items(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line, "", text) of each run of whole-line comments, without its number signs."""
    block: list[str] = []
    start = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line[: token.start[1]].strip():
            continue
        if token.start[0] != last + 1 and block:
            yield start, "", "\n".join(block)
            block = []
        last = token.start[0]
        start = start if block else last
        block.append(re.sub(r"^#+:? ?", "", token.string).rstrip())
    if block:
        yield start, "", "\n".join(block)


def usable(paragraph: str) -> bool:
    """Say whether a paragraph is prose: no legal notice, e-mail address, URL list or rule."""
    lowered = paragraph.lower()
    if "copyright" in lowered or "all rights reserved" in lowered or re.search(r"\w@\w", lowered):
        return False
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    return letters >= len(paragraph) / 2


@dataclass
class Corpus:
    """Documents by module, split by module; every paragraph is kept once."""

    train: dict[str, str] = field(default_factory=dict)
    held_out: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def fresh(self, text: str) -> list[str]:
        """Return the usable paragraphs of ``text`` not met before, and remember them."""
        kept = []
        for paragraph in re.split(r"\n\s*\n", text.expandtabs()):
            key = " ".join(paragraph.split()).lower()
            if key and key not in self.seen and usable(paragraph):
                self.seen.add(key)
                kept.append(paragraph.strip("\n"))
        return kept

    def document(self, name: str, source: str) -> str:
        """Return one module's text in the manner of ``help()``; empty if nothing is new."""
        parts = []
        comments = (item for item in comment_items(source) if len(item[2]) >= MIN_COMMENT)
        for _, title, text in sorted([*doc_items(source), *comments]):
            body = "\n\n".join(self.fresh(text))
            if body:
                parts.append(f"{title}\n{body}" if title else body)
        return "\n\n".join([f"Help on module {name}:", *parts]) if parts else ""


def stable_number(text: str) -> int:
    """Return a number which depends on ``text`` alone, in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def build_corpus(root: Path) -> Corpus:
    """Read the standard library under ``root``; held-out modules come first, so that a paragraph
    which both parts have is evaluated and not trained."""
    from pydoc_data.topics import topics

    corpus = Corpus()
    sources = sorted(module_sources(root), key=lambda item: (stable_number(item[0]), item[0]))
    for part, wanted in ((corpus.held_out, True), (corpus.train, False)):
        for name, source in sources:
            if (stable_number(name) % 100 < HELD_OUT_PERCENT) is wanted:
                text = corpus.document(name, source)
                if text:
                    part[name] = text
    for topic, text in sorted(topics.items()):
        corpus.train[f"help {topic}"] = "\n\n".join(
            [f"Help on topic {topic}:", *corpus.fresh(text)]
        )
    return corpus


def clip(text: str, limit: int) -> str:
    """Return the leading whole paragraphs of ``text`` which fit in ``limit`` characters."""
    kept, size = [], 0
    for paragraph in text.split("\n\n"):
        size += len(paragraph) + 2
        if size > limit:
            break
        kept.append(paragraph)
    return "\n\n".join(kept)


def eval_text(corpus: Corpus) -> str:
    """Return the held-out text: the head of each held-out module, at most EVAL_BYTES."""
    size, kept = 0, []
    for text in corpus.held_out.values():
        piece = clip(text, EVAL_MODULE_BYTES) + "\n\n"
        if len(piece) > 200 and size + len(piece.encode()) <= EVAL_BYTES:
            kept.append(piece)
            size += len(piece.encode())
    return "".join(kept).rstrip() + "\n"


def calibration_lines(corpus: Corpus) -> list[str]:
    """Return JSON lines of training text: pieces of many modules, of different lengths."""
    lines, size = [], 0
    for name in sorted(corpus.train, key=lambda name: (stable_number("calibration " + name), name)):
        text = clip(corpus.train[name], CALIBRATION_MODULE_BYTES)
        while len(text) > 200:
            piece = clip(text, CALIBRATION_PIECES[len(lines) % len(CALIBRATION_PIECES)])
            piece = piece or text.split("\n\n")[0]
            text = text[len(piece) :].lstrip("\n")
            lines.append(json.dumps({"text": piece}, ensure_ascii=False))
            size += len(lines[-1].encode()) + 1
        if size >= CALIBRATION_BYTES:
            break
    return lines


# ----------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer of VOCAB entries with Qwen2's normalizer and split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, target: Path, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, loadable by transformers 4 and 5."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(target)
    path = target / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes its own class name here, which transformers 4 does not know.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["add_prefix_space"] = False
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def pack(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Return the documents as one int64 token stream, each followed by the end token."""
    end = tokenizer.token_to_id(END)
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        stream += [*encoding.ids, end]
    return torch.tensor(stream)


# -------------------------------------------------------------------------------------- model


def new_model(seed: int) -> Qwen3ForCausalLM:
    """Return a randomly initialised model; the caller's random state is left as it was."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.02,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def new_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """Return AdamW which decays matrices and leaves the norms' weights alone."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)


def rate_at(step: int, steps: int) -> float:
    """Return the learning rate: linear warm-up, then a cosine down to FINAL_RATE."""
    if step < WARMUP_STEPS:
        return PEAK_RATE * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return FINAL_RATE + (PEAK_RATE - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def batch_at(stream: torch.Tensor, step: int, seed: int) -> torch.Tensor:
    """Return the rows of one step; they depend on seed and step alone, so a run can resume."""
    length = LENGTHS[step % len(LENGTHS)]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - length, (STEP_TOKENS // length,), generator=generator)
    return stream[starts[:, None] + torch.arange(length)]


def train_step(
    model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, rows: torch.Tensor, rate: float
) -> float:
    """Do one optimizer step on ``rows`` in bf16 autocast and return its loss (nats per token)."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def rounded(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Return a copy with the weights rounded to bf16, as they are published."""
    return copy.deepcopy(model).to(torch.bfloat16)


@torch.no_grad()
def perplexity(model: Qwen3ForCausalLM, stream: torch.Tensor) -> float:
    """Return the perplexity per token over windows of EVAL_LENGTH tokens, in fp32 arithmetic."""
    model = copy.deepcopy(model).float().eval()
    windows = stream[: len(stream) // EVAL_LENGTH * EVAL_LENGTH].view(-1, EVAL_LENGTH)
    total = 0.0
    for rows in windows.split(EVAL_ROWS):
        total += float(model(input_ids=rows, labels=rows, use_cache=False).loss) * len(rows)
    return math.exp(total / len(windows))


def steps_in(minutes: float, stream: torch.Tensor, seed: int) -> int:
    """Return how many steps this machine does in ``minutes``, timed on a throw-away model."""
    model = new_model(seed)
    optimizer = new_optimizer(model)
    train_step(model, optimizer, batch_at(stream, 0, seed), 0.0)  # the first one allocates
    start = time.perf_counter()
    for step in range(len(LENGTHS)):
        train_step(model, optimizer, batch_at(stream, step, seed), 0.0)
    per_step = (time.perf_counter() - start) / len(LENGTHS)
    return max(WARMUP_STEPS, int(0.9 * 60 * minutes / per_step))  # a tenth is for evaluation


@dataclass
class Run:
    """One training: its inputs, its folders, and the best held-out perplexity so far."""

    tokenizer: Tokenizer
    stream: torch.Tensor
    held_out: torch.Tensor
    output: Path
    work: Path
    seed: int
    steps: int
    best: float = math.inf

    def train(self) -> None:
        """Train, resuming from the work folder, and publish whenever the held-out text improves."""
        model = new_model(self.seed)
        optimizer = new_optimizer(model)
        state_file = self.work / f"state-{self.seed}-{self.steps}.pt"
        first = 0
        if state_file.exists():
            state = torch.load(state_file, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first, self.best = state["step"], state["best"]
        start = time.perf_counter()
        for step in range(first, self.steps):
            rows = batch_at(self.stream, step, self.seed)
            loss = train_step(model, optimizer, rows, rate_at(step, self.steps))
            done = step + 1
            if done % EVAL_EVERY and done != self.steps:
                continue
            small = rounded(model)
            value = perplexity(small, self.held_out)
            spent = time.perf_counter() - start
            print(f"step {done} loss {loss:.3f} held-out {value:.2f} {spent:.0f} s", flush=True)
            if value < self.best:
                self.best = value
                self.publish(small, done)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": done, "best": self.best}, state_file)

    def publish(self, model: Qwen3ForCausalLM, step: int) -> None:
        """Put model, tokenizer and card in the output folder, each file complete at any time."""
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            target = Path(folder)
            model.config.dtype = torch.bfloat16
            model.generation_config = GenerationConfig(
                bos_token_id=0, eos_token_id=0, pad_token_id=1, max_length=None
            )
            model.save_pretrained(target)
            save_tokenizer(self.tokenizer, target, model.config.max_position_embeddings)
            (target / "README.md").write_text(self.card(model, step), encoding="utf-8")
            self.output.mkdir(parents=True, exist_ok=True)
            for path in sorted(target.iterdir()):
                fresh = self.output / f".{path.name}.new"
                shutil.copyfile(path, fresh)
                fresh.replace(self.output / path.name)

    def card(self, model: Qwen3ForCausalLM, step: int) -> str:
        """Return the model card."""
        trained = self.steps * STEP_TOKENS
        return CARD.format(
            parameters=sum(weight.numel() for weight in model.parameters()),
            vocab=VOCAB,
            context=model.config.max_position_embeddings,
            tokens=len(self.stream),
            steps=self.steps,
            step=step,
            step_tokens=STEP_TOKENS,
            percent=HELD_OUT_PERCENT,
            trained=trained,
            epochs=trained / len(self.stream),
            seed=self.seed,
            perplexity=self.best,
            window=EVAL_LENGTH,
            held_out=len(self.held_out),
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
        )


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--output-model", type=Path, required=True)
    parser.add_argument("--output-eval", type=Path, required=True)
    parser.add_argument("--output-calibration", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25, help="budget, where --steps is absent")
    parser.add_argument("--steps", type=int, help="optimizer steps of the whole schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder to keep, and to resume a run from")
    return parser.parse_args()


def main() -> None:
    """Build the texts, train the tokenizer and the model, and write every artefact."""
    options = arguments()
    torch.set_num_threads(options.threads)
    corpus = build_corpus(Path(sysconfig.get_path("stdlib")))
    held_out, lines = eval_text(corpus), calibration_lines(corpus)
    for path, text in (
        (options.output_eval, held_out),
        (options.output_calibration, "\n".join(lines) + "\n"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer(list(corpus.train.values()))
    stream = pack(tokenizer, list(corpus.train.values()))
    steps = options.steps or steps_in(options.minutes, stream, options.seed)
    print(f"{len(stream)} training tokens, {steps} steps", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        encoded = torch.tensor(tokenizer.encode(held_out).ids)
        run = Run(tokenizer, stream, encoded, options.output_model, work, options.seed, steps)
        run.train()
    AutoTokenizer.from_pretrained(options.output_model)
    AutoModelForCausalLM.from_pretrained(options.output_model)
    print(f"best held-out perplexity {run.best:.3f}")


if __name__ == "__main__":
    main()
