"""Tasks of lm-eval: the same numbers as the slow way, for every kind of folder; files of tasks; sets, groups, shots."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from support.quantized import block_fp8
from support.tasks import likelihood, rows, slow_samples, speaker, task, written
from support.tokenizers import of_bytes

import sparsify
from sparsify.backends.packed.backend import PackedBackend
from sparsify.context import Progress
from sparsify.errors import SpecError
from sparsify.quality.scores import Score
from sparsify.quality.tasks import names

ROWS = rows()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaker(tmp_path_factory.mktemp("speaker") / "dense")


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task(tmp_path_factory.mktemp("tasks"), "quiz", ROWS)


def loaded(folder: Path) -> tuple[Any, Any]:
    return sparsify.load(folder), hf.AutoTokenizer.from_pretrained(folder)


def samples(found: sparsify.Evaluation, name: str = "quiz") -> dict[str, list[float]]:
    return {metric: list(found.score(name, metric).samples) for metric in ("acc", "acc_norm")}


def test_accuracies_are_those_of_the_slow_way(model: Path, quiz: Path) -> None:
    found, slow = sparsify.evaluate(model, tasks=quiz), slow_samples(*loaded(model), ROWS)
    # It says something of both: neither all right nor all wrong, and the two differ.
    assert slow["acc"] != slow["acc_norm"] and 0 < sum(slow["acc"]) < len(ROWS)
    assert samples(found) == slow
    for metric in ("acc", "acc_norm"):
        score = found.score("quiz", metric)
        assert score.value == statistics.fmean(slow[metric]) and score.n == 24 and score.chance == 0.25
        assert score.standard_error == pytest.approx(statistics.stdev(slow[metric]) / math.sqrt(24), rel=1e-12)
        assert score.shots == 0 and score.share and score.higher_is_better
    assert math.isnan(found.perplexity) and found.windows == 0
    assert samples(sparsify.evaluate(model, tasks=quiz, batch_size=1)) == slow


@pytest.mark.slow
def test_lm_eval_itself_says_the_same(model: Path, quiz: Path) -> None:
    import lm_eval
    import lm_eval.tasks

    import sparsify.lm_eval

    # It knows no task but those in files: reading all others takes it ten seconds.
    none = lm_eval.tasks.TaskManager(include_defaults=False)
    for arguments in (f"pretrained={model}", {"pretrained": str(model), "batch_size": 3}):
        found = lm_eval.simple_evaluate(
            model=sparsify.lm_eval.NAME, model_args=arguments, tasks=[str(quiz)], bootstrap_iters=10, task_manager=none
        )
        own = sparsify.evaluate(model, tasks=quiz)
        for metric in ("acc", "acc_norm"):
            said = found["results"]["quiz"]
            assert said[f"{metric},none"] == own.score("quiz", metric).value
            assert said[f"{metric}_stderr,none"] == pytest.approx(own.score("quiz", metric).standard_error, rel=1e-9)


@pytest.mark.slow
def test_a_packed_folder_answers_as_its_ordinary_one(model: Path, quiz: Path, tmp_path: Path) -> None:
    import lm_eval
    import lm_eval.tasks

    import sparsify.lm_eval

    sparsify.compile(model, "magnitude:2:4", output=tmp_path / "hf")
    sparsify.compile(model, "magnitude:2:4", output=tmp_path / "packed", to=PackedBackend(choice="smallest"))
    ordinary, packed = (sparsify.evaluate(tmp_path / name, tasks=quiz) for name in ("hf", "packed"))
    assert packed.scores == ordinary.scores and samples(packed) != samples(sparsify.evaluate(model, tasks=quiz))
    inside = lm_eval.simple_evaluate(
        model="sparsify", model_args={"pretrained": str(tmp_path / "packed")}, tasks=[str(quiz)], bootstrap_iters=0,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )  # fmt: skip
    assert inside["results"]["quiz"]["acc,none"] == packed.score("quiz").value


def test_an_onnx_folder_answers_as_torch_does(model: Path, quiz: Path, tmp_path: Path) -> None:
    """In onnxruntime: texts whose likelihood of every answer is within float32's rounding of torch's."""
    sparsify.compile(model, to="onnx", output=tmp_path / "onnx")
    found = sparsify.evaluate(tmp_path / "onnx", tasks=quiz)
    assert samples(found) == slow_samples(*loaded(model), ROWS)
    # The weights beside the graph are not what answered.
    assert (tmp_path / "onnx" / "model.onnx").exists()
    (tmp_path / "onnx" / "model.onnx").unlink()
    (tmp_path / "onnx" / "other.onnx").write_bytes(b"no graph")
    with pytest.raises(sparsify.SparsifyError, match=r"other\.onnx|model\.onnx"):
        sparsify.evaluate(tmp_path / "onnx", tasks=quiz)


def test_a_checkpoint_with_a_graph_beside_it_is_the_checkpoint(model: Path, quiz: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "both")
    (tmp_path / "both" / "model.onnx").write_bytes(b"no graph")
    assert samples(sparsify.evaluate(tmp_path / "both", tasks=quiz)) == samples(sparsify.evaluate(model, tasks=quiz))
    with pytest.raises(sparsify.SparsifyError, match=r"model\.onnx"):
        sparsify.evaluate(tmp_path / "both" / "model.onnx", tasks=quiz)


@pytest.mark.slow
def test_a_ragged_folder_answers(quiz: Path, tmp_path: Path) -> None:
    dense = speaker(tmp_path / "dense", num_hidden_layers=4)
    sparsify.compile(dense, "llm-pruner:25%,importance=l2,scope=global", output=tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "sparsify.json").read_text())
    assert any(record.get("ragged") for record in manifest["structure"])
    assert samples(sparsify.evaluate(tmp_path / "out", tasks=quiz)) == slow_samples(*loaded(tmp_path / "out"), ROWS)


def test_a_model_in_memory_and_its_tokenizer_stay_as_they_are(model: Path, quiz: Path) -> None:
    module, tokenizer = hf.LlamaForCausalLM.from_pretrained(model).train(), hf.AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = None
    before = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    found = sparsify.evaluate(module, tasks=quiz, tokenizer=tokenizer)
    assert samples(found) == slow_samples(*loaded(model), ROWS)
    assert module.training and all(p.requires_grad for p in module.parameters()) and tokenizer.pad_token is None
    assert before == {name: parameter.data_ptr() for name, parameter in module.named_parameters()}


def test_the_result_of_a_compile_is_asked_as_its_passes_left_it(model: Path, quiz: Path, tmp_path: Path) -> None:
    made = sparsify.compile(model, "magnitude:75%")
    assert samples(sparsify.evaluate(made, tasks=quiz)) == slow_samples(*loaded(made.save(tmp_path / "out")), ROWS)


def test_a_quantized_folder_answers(quiz: Path, tmp_path: Path) -> None:
    folder = block_fp8(speaker(tmp_path / "fp8"))
    assert "quantization_config" in (folder / "config.json").read_text()
    found = sparsify.evaluate(folder, tasks=quiz, batch_size=1)
    assert samples(found) == slow_samples(*loaded(folder), ROWS)


def test_a_head_that_is_no_longer_tied_stays_so(quiz: Path, tmp_path: Path) -> None:
    """lm-eval ties what a model's config says is tied; the file holds two, which differ."""
    folder = speaker(tmp_path / "untied", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tied = samples(sparsify.evaluate(folder, tasks=quiz))
    head = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    assert samples(sparsify.evaluate(folder, tasks=quiz)) == slow_samples(*loaded(folder), ROWS) != tied


def test_an_encoder_decoder_answers(quiz: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 264}
    model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0)).eval()
    model.save_pretrained(tmp_path / "t5")
    of_bytes().save_pretrained(tmp_path / "t5")
    slow = []
    for row in ROWS:
        sums = []
        for choice in row["choices"]:
            before, after = (torch.tensor([of_bytes()(text)["input_ids"]]) for text in (row["question"], choice))
            with torch.no_grad():
                logits = model(input_ids=before, labels=after).logits[0].double().log_softmax(-1)
            sums.append(float(logits.gather(1, after[0][:, None]).sum()))
        slow.append(float(sums.index(max(sums)) == row["answer"]))
    assert samples(sparsify.evaluate(tmp_path / "t5", tasks=quiz, batch_size=1))["acc"] == slow


def test_compute_dtype_is_what_answers(model: Path, quiz: Path) -> None:
    module, tokenizer = loaded(model)
    found = sparsify.evaluate(model, tasks=quiz, compute_dtype="bfloat16")
    slow = slow_samples(module.to(torch.bfloat16), tokenizer, ROWS)
    assert sum(one != other for one, other in zip(samples(found)["acc"], slow["acc"], strict=True)) <= 1


def test_text_and_tasks_at_once(model: Path, quiz: Path) -> None:
    ids = torch.randint(3, 260, (4, 16), generator=torch.Generator().manual_seed(1))
    both = sparsify.evaluate(model, ids, tasks=quiz)
    assert both.perplexity == sparsify.evaluate(model, ids).perplexity
    assert both.scores == sparsify.evaluate(model, tasks=quiz).scores
    assert "perplexity" in repr(both) and "quiz acc " in repr(both) and both.as_dict()["windows"] == 4


def test_two_models_on_the_same_documents(model: Path, quiz: Path) -> None:
    """The paired error is that of the differences of each document, not of two accuracies apart."""
    dense, pruned = (sparsify.evaluate(one, tasks=quiz) for one in (model, sparsify.compile(model, "magnitude:75%")))
    (difference,) = [pair for pair in pruned.differences(dense) if pair.score.metric == "acc_norm"]
    after, before = samples(pruned)["acc_norm"], samples(dense)["acc_norm"]
    pairs = [a - b for a, b in zip(after, before, strict=True)]
    assert any(pairs) and difference.changed == sum(map(bool, pairs))
    assert difference.value == pytest.approx(statistics.fmean(after) - statistics.fmean(before), abs=1e-12)
    assert difference.standard_error == pytest.approx(statistics.stdev(pairs) / math.sqrt(24), rel=1e-9)
    other = sparsify.evaluate(model, tasks=quiz, limit=8)
    assert other.score("quiz").samples == dense.score("quiz").samples[:8] and not pruned.differences(other)


def test_examples_are_the_same_for_every_model(model: Path, quiz: Path) -> None:
    none, some = (sparsify.evaluate(model, tasks=quiz, num_fewshot=shots) for shots in (0, 2))
    again = sparsify.evaluate(sparsify.compile(model, "magnitude:2:4"), tasks=quiz, num_fewshot=2)
    assert some.score("quiz").shots == 2 and none.score("quiz").shots == 0
    assert again.score("quiz").sha256 == some.score("quiz").sha256 != none.score("quiz").sha256


def test_a_folder_of_tasks_a_group_and_names_of_both(model: Path, tmp_path: Path) -> None:
    content = {name: rows(count, seed) for name, count, seed in (("first", 8, 1), ("second", 16, 2))}
    for name, own in content.items():
        task(tmp_path / "tasks", name, own)
    every = sparsify.evaluate(model, tasks=str(tmp_path / "tasks"))
    assert [score.key for score in every.scores] == [
        (name, metric) for name in ("first", "second") for metric in ("acc", "acc_norm")
    ]
    slow = {name: slow_samples(*loaded(model), own)["acc"] for name, own in content.items()}
    assert {name: list(every.score(name).samples) for name in content} == slow

    metrics = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "both", "task": list(content), "aggregate_metric_list": metrics}
    written(tmp_path / "tasks" / "both.yaml", group)
    for asked in (tmp_path / "tasks" / "both.yaml", "both"):
        # Its file asks lm-eval for all that it knows; the folder that is included has it by name.
        found = sparsify.evaluate(model, tasks=asked, include=tmp_path / "tasks")
        whole = found.score("both")
        assert whole.value == statistics.fmean([*slow["first"], *slow["second"]]) and (whole.n, whole.tasks) == (24, 2)
        assert list(whole.samples) == [*slow["first"], *slow["second"]]


def test_the_mean_of_a_set_counts_each_task_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(names.SUITES, "pair", ("one", "two"))
    for name, count in (("one", 6), ("two", 18)):
        task(tmp_path, name, rows(count, count))
    dense, pruned = (
        sparsify.evaluate(one, tasks="pair", include=tmp_path)
        for one in (model, sparsify.compile(model, "magnitude:75%"))
    )
    mean, parts = dense.score("mean of pair"), [dense.score("one"), dense.score("two")]
    assert mean.value == pytest.approx((parts[0].value + parts[1].value) / 2, rel=1e-12) and mean.n == 24
    errors = [part.standard_error or 0 for part in parts]
    assert mean.standard_error == pytest.approx(math.hypot(*errors) / 2, rel=1e-12)
    (pair,) = [pair for pair in pruned.differences(dense) if pair.score.parts]
    singles = [pruned.score(name).against(dense.score(name)) for name in ("one", "two")]
    assert pair.value == pytest.approx(sum(one.value for one in singles if one) / 2, rel=1e-12)
    assert mean.as_dict()["mean_of"] == ["one", "two"]


def test_wanda7_is_the_papers_seven() -> None:
    assert names.SUITES["wanda7"] == (
        "boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
    )  # fmt: skip


def test_tasks_that_write_text(model: Path, tmp_path: Path) -> None:
    """Greedy text up to a line's end, as transformers writes it."""
    module, tokenizer = loaded(model)
    content = [{"question": row["question"]} for row in ROWS[:6]]
    for row in content:
        ids = tokenizer(row["question"], return_tensors="pt")
        with torch.no_grad():
            out = module.generate(**ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        row["answer"] = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    content[0]["answer"] = "nobody says this"
    path = task(
        tmp_path, "writing", content, output_type="generate_until", doc_to_choice=None,
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 5},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    told: list[Progress] = []
    found = sparsify.evaluate(model, tasks=path, observe=told.append).score("writing", "exact_match")
    assert list(found.samples) == [0, *[1] * 5] and found.chance is None
    assert any(step.phase == "writing answers" for step in told)


@pytest.mark.parametrize("to", ["hf", "onnx"])
def test_tasks_that_read_texts(model: Path, tmp_path: Path, to: str) -> None:
    """Perplexity of whole texts, in windows where they are longer than the model's context."""
    texts = ["the river and the stone " * 4, "seventeen lanterns " * 20]
    path = task(
        tmp_path, "reading", [{"text": text} for text in texts], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", doc_to_choice=None, metric_list=[{"metric": "byte_perplexity"}],
    )  # fmt: skip
    folder = model if to == "hf" else sparsify.compile(model, to=to, output=tmp_path / "out").output
    found = sparsify.evaluate(folder, tasks=path).score("reading", "byte_perplexity")
    module, tokenizer = loaded(model)
    # The second is longer than the context: its last window begins as early as it can.
    assert len(tokenizer(texts[1])["input_ids"]) > 256 > len(tokenizer(texts[0])["input_ids"])
    first = likelihood(module, tokenizer, "<s>", texts[0])[0]
    head = likelihood(module, tokenizer, "<s>", texts[1][:256])[0]
    tail = likelihood(module, tokenizer, texts[1][-257:256], texts[1][256:])[0]
    total = first + head + tail
    assert found.value == pytest.approx(math.exp(-total / sum(map(len, texts))), rel=1e-4)
    assert not found.share and not found.samples and found.higher_is_better is False


def test_what_others_draw_is_left_alone_and_nothing_is_printed(
    model: Path, quiz: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    level = logging.getLogger("lm_eval").level
    capfd.readouterr()
    told: list[Progress] = []
    sparsify.evaluate(model, tasks=quiz, num_fewshot=1, observe=told.append)
    assert capfd.readouterr() == ("", "") and logging.getLogger("lm_eval").level == level
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    phases = list(dict.fromkeys(step.phase for step in told))
    assert phases == [
        "looking up tasks",
        "loading",
        "loading tasks",
        "reading weights",
        "writing questions",
        "answering",
    ]
    answers = [step for step in told if step.phase == "answering"]
    assert [answers[0].count, answers[-1].count] == ["0/96", "96/96"]


@pytest.mark.first(1)
@pytest.mark.parametrize("to", ["hf", "onnx"])
def test_questions_longer_than_the_context_are_told_of(quiz: Path, tmp_path: Path, to: str) -> None:
    """The end of the question is what is read then, as lm-eval does."""
    folder = speaker(tmp_path / "short", max_position_embeddings=16)
    if to == "onnx":
        sparsify.compile(folder, to="onnx", output=tmp_path / "onnx")
    found = sparsify.evaluate(folder if to == "hf" else tmp_path / "onnx", tasks=quiz)
    texts = [(row["question"], choice) for row in ROWS for choice in row["choices"]]
    cut = sum(len(question) + len(choice) > 17 for question, choice in texts)
    assert cut > 0 and len(found.notes) == 1 and found.notes[0].startswith(f"{cut} answers were judged by the end")
    content = [row | {"question": row["question"][-9:]} for row in ROWS]
    assert not sparsify.evaluate(folder, tasks=task(tmp_path, "ends", content)).notes


def test_what_an_observer_raises_is_its_own(model: Path, quiz: Path) -> None:
    for phase in ("loading tasks", "writing questions", "answering"):

        def stop(step: Progress, phase: str = phase) -> None:
            if step.phase == phase:
                raise RuntimeError("enough")

        with pytest.raises(RuntimeError, match="enough"):
            sparsify.evaluate(model, tasks=quiz, observe=stop)


def test_how_it_is_shown(model: Path, quiz: Path) -> None:
    found = sparsify.evaluate(model, tasks=quiz)
    score = found.score("quiz")
    assert repr(found).startswith(f"<Evaluation: quiz acc {score.said}, quiz acc_norm ")
    assert f"<td>quiz</td><td>acc</td><td>{score.said}</td><td>24</td>" in found._repr_html_()
    said = json.loads(json.dumps(found.as_dict()))
    assert said["perplexity"] is None and said["windows"] is None
    assert said["scores"][0]["value"] == score.value and "samples" not in said["scores"][0]
    with pytest.raises(SpecError, match=r"score 'quiz accuracy': none of that name.*quiz acc"):
        found.score("quiz", "accuracy")
    with pytest.raises(SpecError, match="no perplexity of either"):
        found.against(found)


def test_scores_of_other_metrics_are_not_compared() -> None:
    one = Score("a", "acc", 0.5, None, 1, samples=(0.5,))
    assert one.against(Score("a", "acc_norm", 0.5, None, 1, samples=(0.5,))) is None
    assert one.against(Score("a", "acc", 0.5, None, 1, samples=(0.5,), sha256="other")) is None
