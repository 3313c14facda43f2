"""A model asked the questions of tasks, and what its answers are worth."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from typing import Any

import torch

from sparsify.errors import BackendError, CalibrationError, CheckpointError, SparsifyError, TraceError, first_line
from sparsify.frontend.source import Source
from sparsify.frontend.text_config import text_config
from sparsify.host import is_out_of_memory, quiet, within_memory
from sparsify.precision import exact_products
from sparsify.quality.graphs import Graph
from sparsify.quality.running import running_module
from sparsify.quality.scores import Score, mean_and_error, mean_of
from sparsify.quality.tasks.chosen import LOGGERS, Chosen, Named, is_observers, seeded
from sparsify.quality.tasks.hushed import hushed
from sparsify.quality.tasks.names import SUITE_METRIC
from sparsify.runtime.cpu.wide import wide_products
from sparsify.world.world import ALONE, World

# Questions at a time.
BATCH = 8
# Draws of documents for the standard error of what is no mean over them.
_DRAWS = 200
# Metrics of multiple choice, of which it is known what guessing gives.
_CHOICES = ("acc", "acc_norm")


def check_answers(model: Source | Graph) -> None:
    """Whether ``model`` can be asked at all, before its weights are read.

    Raises:
        TraceError: no language model. CheckpointError: no tokenizer.
    """
    if isinstance(model, Source):
        module: Any = model.module
        name = type(module).__name__
        # Code that a model brings along may predict tokens without transformers' way to generate.
        predicts = model.is_transformers and (name.endswith(("ForCausalLM", "LMHeadModel")) or module.can_generate())
        if not predicts or getattr(module, "main_input_name", "input_ids") != "input_ids":
            raise no_language_model(model.name, f"{name}, which predicts no text")
    elif "input_ids" not in model.inputs:
        raise no_language_model(model.name, f"a graph of {', '.join(model.inputs)}, which predicts no text")
    model.tokenizer()


def ready(tasks: Named, model: Source | Graph, num_fewshot: int | None) -> Chosen:
    """``tasks`` with their data, for a model that can answer them; nothing large is read for one that cannot.

    Raises:
        TraceError, CheckpointError: as :func:`check_answers`. BackendError: it cannot write text, and tasks want it to.
        CalibrationError, SpecError: as :meth:`Named.load`.
    """
    check_answers(model)
    chosen = tasks.load(num_fewshot)
    if chosen.generating and not isinstance(model, Source):
        raise cannot_write(model.name, chosen.generating)
    return chosen


def cannot_write(name: str, tasks: Sequence[str]) -> BackendError:
    """That an ONNX folder was asked to write text."""
    return BackendError(
        f"{', '.join(tasks)} for {name}",
        found="tasks for which text must be written, and an ONNX graph, of which likelihoods alone are taken",
        do="Take tasks of multiple choice, or evaluate the folder that it was made of",
    )


def no_language_model(name: str, found: str) -> TraceError:
    """That tasks were asked of a model of another kind."""
    return TraceError(
        f"tasks for {name}", found=found, do="Tasks ask language models; an image classifier has --data IMAGES"
    )


def language_model(model: Source | Graph, device: torch.device, batch_size: int = BATCH, world: World = ALONE) -> Any:
    """``model`` as lm-eval's own kind of model, its weights in memory; of several processes each has all of it, and
    answers its share.

    Raises:
        TraceError, CheckpointError: as :func:`check_answers`. CalibrationError: too little memory.
    """
    check_answers(model)
    if isinstance(model, Source):
        from sparsify.quality.tasks.on_torch import TorchModel

        tokenizer = model.tokenizer()
        _check_ends(tokenizer, model.name)
        module = running_module(model, device)
        with quiet(*LOGGERS):
            return TorchModel(module, tokenizer, batch_size=batch_size, world=world)
    from sparsify.quality.tasks.on_graph import GraphModel

    tokenizer = model.tokenizer()
    _check_ends(tokenizer, model.name)
    return GraphModel(model, tokenizer, max_length=_context(model.config(), tokenizer), world=world)


def answer(lm: Any, chosen: Chosen, name: str, device: torch.device, limit: int | None = None) -> list[Score]:
    """The scores of ``lm``, which is called ``name``, by every metric of every task, group and set.

    Args:
        limit: the first so many documents of each task.

    Raises:
        CalibrationError: a task whose own code fails on its data, or too little memory.
    """
    import lm_eval

    with (
        quiet(*LOGGERS),
        hushed(),
        seeded(),
        exact_products(),
        wide_products(),
        within_memory(f"tasks for {name}", device, "Take --batch-size 1, fewer examples, or --device cpu"),
    ):
        for task in chosen.tasks.values():
            # Examples are drawn anew, the same for every model.
            task.set_fewshot_seed(seed=1234)
        try:
            found = lm_eval.evaluate(lm, chosen.loaded(), limit=limit, log_samples=True, bootstrap_iters=0)
        except SparsifyError:
            raise
        except Exception as error:  # a task's code meets its data
            if is_out_of_memory(error) or is_observers(error):
                raise
            raise CalibrationError(
                f"tasks {', '.join(chosen.words)} for {name}",
                found=f"{type(error).__name__}: {first_line(error)}",
                do="Mend the task's file or its data; --debug shows where",
            ) from error
    return _scores(found, chosen)


def notes(lm: Any) -> tuple[str, ...]:
    """What is to be known of the answers of ``lm``."""
    if not lm.cut:
        return ()
    return (
        f"{lm.cut} answers were judged by the end of their question alone: with it they are longer than the "
        f"{lm.max_length} tokens of the model's context",
    )


def _scores(found: Any, chosen: Chosen) -> list[Score]:
    """lm-eval's results as scores: tasks, groups, sets."""
    scores = [score for name in chosen.tasks for score in _of_task(name, found, chosen.tasks[name])]
    by_key = {score.key: score for score in scores}
    for name, group in chosen.groups.items():
        scores += _of_group(name, found, [task.task_name for task in group.get_all_tasks()], by_key)
    for name, tasks in chosen.suites.items():
        parts = [by_key[task, SUITE_METRIC] for task in tasks if (task, SUITE_METRIC) in by_key]
        if len(parts) == len(tasks):
            scores.append(mean_of(f"mean of {name}", parts))
    return scores


def _of_task(name: str, found: Any, task: Any) -> list[Score]:
    documents = found["samples"][name]
    scores = []
    for key, value in found["results"][name].items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        own = [document for document in documents if document["filter"] == filtered and metric in document]
        values = [document[metric] for document in own]
        samples, error = _errors(values, task, metric)
        choices = [len(document["resps"]) for document in own]
        guessed = task.OUTPUT_TYPE == "multiple_choice" and metric in _CHOICES and "acc_mutual_info" not in own[0]
        scores.append(
            Score(
                task=name,
                metric=metric if filtered == "none" else f"{metric} ({filtered})",
                value=float(value),
                standard_error=error,
                n=len(values),
                higher_is_better=found["higher_is_better"][name].get(metric) is not False,
                share=_is_share(samples),
                chance=math.fsum(1 / count for count in choices) / len(choices) if guessed and all(choices) else None,
                shots=found["n-shot"].get(name),
                samples=samples,
                sha256=_digest(own),
            )
        )
    return scores


def _of_group(name: str, found: Any, tasks: Sequence[str], by_key: dict[tuple[str, str], Score]) -> list[Score]:
    """A group's own numbers; where they are means over all documents of its tasks, with those documents."""
    scores = []
    for key, value in found.get("groups", {}).get(name, {}).items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        said = metric if filtered == "none" else f"{metric} ({filtered})"
        parts = [by_key[task, said] for task in tasks if (task, said) in by_key]
        samples = tuple(sample for part in parts for sample in part.samples)
        whole = bool(samples) and math.isclose(math.fsum(samples) / len(samples), value, abs_tol=1e-9)
        mean = mean_of(name, parts) if parts else None
        if whole:
            error = mean_and_error(samples)[1]
        else:
            plain = mean is not None and math.isclose(mean.value, value, abs_tol=1e-9)
            error = mean.standard_error if plain and mean is not None else None
        chances = [part.chance * part.n for part in parts if part.chance is not None]
        count = sum(part.n for part in parts)
        scores.append(
            Score(
                task=name,
                metric=said,
                value=float(value),
                standard_error=error,
                n=count,
                higher_is_better=all(part.higher_is_better for part in parts),
                share=_is_share(samples) if whole else bool(parts) and all(part.share for part in parts),
                chance=math.fsum(chances) / count if chances and len(chances) == len(parts) else None,
                shots=found["n-shot"].get(name),
                tasks=len(parts),
                samples=samples if whole else (),
                sha256=hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest(),
            )
        )
    return scores


def _errors(values: Sequence[Any], task: Any, metric: str) -> tuple[tuple[float, ...], float | None]:
    """Of each document its value, where the metric is their mean; and the metric's standard error."""
    from lm_eval.api import metrics

    gathered = task.aggregation().get(metric, metrics.mean)
    numbers = all(isinstance(value, (int, float)) for value in values)
    if gathered is metrics.mean and numbers:
        samples = tuple(map(float, values))
        return samples, mean_and_error(samples)[1]
    if len(values) < 2:
        return (), None
    drawn = random.Random(0)
    try:
        many = [float(gathered(drawn.choices(values, k=len(values)))) for _ in range(_DRAWS)]
    except Exception:  # a metric that is not defined for every choice of documents has no such error
        return (), None
    mean = math.fsum(many) / _DRAWS
    return (), math.sqrt(math.fsum((value - mean) ** 2 for value in many) / (_DRAWS - 1))


def _is_share(samples: Sequence[float]) -> bool:
    return bool(samples) and all(0 <= sample <= 1 for sample in samples)


def _digest(documents: Sequence[Any]) -> str:
    """Of what was asked and what is right, whatever the model."""
    asked = "".join(f"{d['doc_id']}{d['prompt_hash']}{d['target_hash']}" for d in documents)
    return hashlib.sha256(asked.encode()).hexdigest()


def _check_ends(tokenizer: Any, name: str) -> None:
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise CheckpointError(
            f"the tokenizer of {name}",
            found="neither a token that begins a text nor one that ends it",
            do="Name one in tokenizer_config.json: a text without anything before it needs it",
        )


def _context(config: Any, tokenizer: Any) -> int:
    from lm_eval.models.utils import resolve_max_length

    length: int = resolve_max_length(text_config(config), tokenizer, default=2048)
    return length
