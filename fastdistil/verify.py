"""Is a checkpoint computed right here? Layer by layer against float64, and against transformers where installed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistil.checkpoint import Weights, find, read_config
from fastdistil.flexible_heads import DistilBertModelWithHeads, model_class
from fastdistil.model import DistilBertModel
from fastdistil.pretrained import as_device, one_device
from fastdistil.tokenizer import DistilBertTokenizer

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "a",
    "Sphinx of black quartz, judge my vow! " * 12,
    "In 1969 the first message was sent over ARPANET, from UCLA to the Stanford Research Institute: it read 'lo'.",
    "北京 naïve Straße — 3.14159 ☃",
)


@dataclass
class Line:
    """One comparison: errors at real tokens, and the largest that is allowed."""

    name: str
    largest: float
    mean: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.largest <= self.allowed  # False for NaN


@dataclass
class Report:
    """What `verify` found.

    cosine: the least between mean-pooled hidden states here and in float64. flips: predictions that differ from
    float64's, of how many; within the bounds they are near ties. not_finite: tensors of the checkpoint that hold a NaN
    or an infinity. missing: parameters that the checkpoint lacks. unused: its tensors that the model has no place for,
    which were not checked but for that.
    """

    model: str
    where: str
    lines: list[Line] = field(default_factory=list)
    cosine: float = 1.0
    flips: tuple[int, int] | None = None
    not_finite: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    peer: str = "transformers is not installed"

    @property
    def holds(self) -> bool:
        whole = not self.not_finite and not self.missing
        return whole and all(line.holds for line in self.lines) and self.cosine > 0.999

    def __str__(self) -> str:
        rows = [f"{self.model} on {self.where}; {self.peer}", f"{'':28}{'max error':>12}{'mean':>12}{'allowed':>12}"]
        for line in self.lines:
            verdict = "" if line.holds else "  TOO LARGE"
            rows.append(f"{line.name:28}{line.largest:12.2e}{line.mean:12.2e}{line.allowed:12.2e}{verdict}")
        rows.append(f"least cosine of mean-pooled embeddings: {self.cosine:.9f}")
        if self.flips is not None:
            rows.append(f"predictions unlike float64's: {self.flips[0]} of {self.flips[1]}")
        rows += [f"NOT FINITE: {name}" for name in self.not_finite]
        rows += [f"MISSING: {name}" for name in self.missing]
        if self.unused:
            more = f" and {len(self.unused) - 4} more" if len(self.unused) > 4 else ""
            rows.append(f"not used by {self.model}, and not checked: {', '.join(self.unused[:4])}{more}")
        return "\n".join([*rows, "all within bounds" if self.holds else "NOT WITHIN BOUNDS"])


@torch.inference_mode()
def verify(
    path_or_repo: Any,
    texts: Sequence[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
) -> Report:
    """Run a checkpoint on texts (by default five of its own) in every way, and compare.

    The fast path must obey the error law, max|fast - float64| <= 2 max|eager - float64| + eps max|float64|, in every
    hidden state and in the logits, where eager is plain torch in the same dtype. transformers' model, if it can be
    loaded, may err twice as much. device: by default cuda when there is one; dtype: "auto" is the checkpoint's.
    Raises OSError for files, ValueError for what is in them.
    """
    directory = find(path_or_repo, revision=revision, local_files_only=local_files_only)
    place = as_device(one_device("auto") if device is None else device)
    kind = model_class(read_config(directory))
    texts = texts if texts is None or isinstance(texts, str) else list(texts)
    if isinstance(texts, str) or texts == []:
        raise TypeError(f"texts must be a list of one text or more, got {texts!r:.60}")
    if dtype in ("int8", "torch.int8", torch.int8):
        raise ValueError("int8 obeys no error law; verify the checkpoint in float32")
    model, loading = kind.from_pretrained(directory, dtype=dtype, device=place, output_loading_info=True)
    if isinstance(model, DistilBertModelWithHeads) and not model.heads:
        model, kind = model.distilbert, DistilBertModel  # whose hidden states are all there is
    report = Report(kind.__name__, f"{place}, {str(model.dtype).removeprefix('torch.')}")
    report.missing, report.unused = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    report.not_finite = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    with Weights(directory) as weights:
        for name in report.unused:
            tensor = weights.read(name)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                report.not_finite.append(name)
    tokenizer = DistilBertTokenizer.from_pretrained(directory)
    longest = min(model.config.max_position_embeddings, tokenizer.model_max_length)
    chosen = list(texts or TEXTS)
    if (
        isinstance(model, DistilBertModelWithHeads) and model.task()[0] == "multiple_choice"
    ):  # as many as it can choose of
        count = model.heads_config[str(model.active_head)]["num_choices"]
        chosen = [chosen[i % len(chosen)] for i in range(-(-len(chosen) // count) * count)]
    batch = tokenizer(chosen, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    ids, mask = batch["input_ids"].to(place), batch["attention_mask"].to(place)
    keep = mask.bool()
    if kind.__name__.endswith("MultipleChoice"):  # each text a choice
        ids, mask = ids[None], mask[None]

    fast = _outputs(model(ids, mask, output_hidden_states=True))
    eager = _outputs(model(ids, mask, output_hidden_states=True, output_attentions=True))  # asks for the dense path
    wide = kind.from_pretrained(directory, dtype=torch.float64, device=place)
    for name in report.missing:  # random numbers, the same here and there
        wide.get_parameter(name).copy_(model.get_parameter(name))
    truth = _outputs(wide(ids, mask, output_hidden_states=True, output_attentions=True))
    eps = torch.finfo(model.dtype).eps
    allowed = {}
    for name, true in truth.items():
        true, ours, theirs = (_real(x, keep) for x in (true, fast[name], eager[name]))
        allowed[name] = 2 * float((theirs - true).abs().max()) + eps * float(true.abs().max())
        report.lines.append(_line(name, ours - true, allowed[name]))
    last = [x for x in truth if x.startswith(("layer", "embeddings"))][-1]
    means = [((x[last].double() * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)) for x in (fast, truth)]
    report.cosine = float(F.cosine_similarity(*means).min())
    pairs = [[_decisions(model, x[name], keep) for x in (fast, truth)] for name in truth if "logits" in name]
    one = kind.__name__ == "DistilBertForSequenceClassification" and model.config.num_labels == 1
    if pairs and not one and model.config.problem_type != "regression":
        report.flips = (sum(int((a != b).sum()) for a, b in pairs), sum(a.numel() for a, _ in pairs))
    for name, found in _peer(report, directory, ids, mask, model, truth):
        report.lines.append(
            _line(f"transformers {name}", _real(found, keep) - _real(truth[name], keep), 2 * allowed[name])
        )
    return report


def _outputs(out: Any) -> dict[str, Tensor]:
    """Hidden states and logits by name."""
    states = {("embeddings" if i == 0 else f"layer {i}"): x for i, x in enumerate(out.hidden_states)}
    return states | {key: value for key, value in out.items() if "logits" in key}


def _real(x: Tensor, keep: Tensor) -> Tensor:
    """Values at real tokens, float64; what has no tokens stays."""
    return (x[keep] if x.shape[:2] == keep.shape else x).double()


def _decisions(model: Any, logits: Tensor, keep: Tensor) -> Tensor:
    """What a head decides by its logits: at every real token, for every text, or for every label."""
    kind = model.task()[0]
    if kind == "question_answering":  # [texts, length], a token of each text
        return logits.masked_fill(~keep, -torch.inf).argmax(-1)
    if kind == "multilabel_classification" or model.config.problem_type == "multi_label_classification":
        return logits > 0
    return (logits[keep] if kind in ("tagging", "masked_lm") else logits).argmax(-1)


def _line(name: str, error: Tensor, allowed: float) -> Line:
    return Line(name, float(error.abs().max()), float(error.abs().mean()), allowed)


def _peer(
    report: Report, directory: Path, ids: Tensor, mask: Tensor, model: Any, truth: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """transformers' hidden states and logits, as far as it has the model."""
    try:
        import transformers
    except ImportError:
        return
    cls: Any = transformers.AutoModel
    if not isinstance(model, DistilBertModel):
        cls = getattr(transformers, (model.config.architectures or [""])[0], cls)
    report.peer = f"beside transformers {transformers.__version__}, {cls.__name__}"
    theirs = cls.from_pretrained(directory, dtype=model.dtype, attn_implementation="eager").eval().to(ids.device)
    found = _outputs(theirs(input_ids=ids, attention_mask=mask, output_hidden_states=True))
    yield from ((name, value) for name, value in found.items() if name in truth)
