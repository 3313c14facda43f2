"""Several processes answer tasks and name pictures as one does: every score, to the last digit."""

import json
from collections import Counter

import pytest
import torch
from support.processes import finish, start
from support.tasks import rows, speaker, task

import sparsify
from sparsify.quality.tasks.dealing import batches_of_likelihoods, batches_of_texts, dealt
from sparsify.world.world import World

CODE = """
import json
told = []
with join() as world:
    for model, words in json.loads(sys.argv[1]):
        found = sparsify.evaluate(model, **words, world=world)
        told.append([found.as_dict(), list(found.notes), [list(score.samples) for score in found.scores]])
print(json.dumps(told))
"""


@pytest.mark.slow
def test_scores_are_those_of_one_process(tmp_path):
    from quality.test_pictures import LABELS, classifier, pictures

    model = speaker(tmp_path / "model")
    quiz = task(tmp_path / "tasks", "quiz", rows(21))
    texts = [{"text": word * count} for word, count in (("the river ", 9), ("a stone ", 50), ("lanterns ", 70))]
    reading = task(
        tmp_path / "tasks", "reading", texts, output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", doc_to_choice=None, metric_list=[{"metric": "byte_perplexity"}],
    )  # fmt: skip
    writing = task(
        tmp_path / "tasks", "writing", rows(7), output_type="generate_until", doc_to_choice=None,
        doc_to_target="{{choices[0]}}", generation_kwargs={"until": ["\n\n"], "max_gen_toks": 5},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    seen = classifier(tmp_path / "seen")
    folder = pictures(tmp_path / "pictures", tuple(name.partition(",")[0] for name in LABELS), 3)
    graph = sparsify.compile(model, to="onnx", output=tmp_path / "onnx").output
    asked = [
        (str(model), {"tasks": [str(quiz), str(reading), str(writing)], "batch_size": 4}),
        # Of one picture the second process has none.
        (str(seen), {"data": str(folder), "batch_size": 5}),
        (str(seen), {"data": str(folder), "limit": 1}),
        (str(graph), {"tasks": [str(quiz), str(reading)]}),
    ]
    done = finish(start(2, CODE, json.dumps(asked)))
    assert [code for code, *_ in done] == [0, 0], done
    ours = [json.loads(said.splitlines()[-1]) for _, said, _ in done]
    torch.set_num_threads(1)
    for number, (name, words) in enumerate(asked):
        alone = sparsify.evaluate(name, **words)
        samples = [list(score.samples) for score in alone.scores]
        assert any(samples)
        for each in ours:
            said, notes, found = each[number]
            assert {**said, "seconds": 0} == json.loads(json.dumps({**alone.as_dict(), "seconds": 0}))
            assert notes == list(alone.notes) and found == samples


def test_likelihoods_are_batched_as_lm_eval_does():
    collator = pytest.importorskip("lm_eval.models.utils").Collator
    generator = torch.Generator().manual_seed(0)

    def drawn(most):
        return torch.randint(0, 3, (int(torch.randint(1, most, (1,), generator=generator)),), generator=generator)

    requests = [(None, drawn(4).tolist(), drawn(3).tolist()) for _ in range(60)]
    for grouped in (True, False):
        theirs = collator(
            requests, sort_fn=lambda r: (-len(r[1] + r[2]), tuple(r[1] + r[2])), group_fn=lambda r: r[1] + r[2][:-1],
            group_by="contexts" if grouped else None,
        )  # fmt: skip
        asked = [sorted(tuple(r[1] + r[2][:-1]) for r in chunk) for chunk in theirs.get_batched(n=4)]
        ours = batches_of_likelihoods(requests, 4, grouped=grouped)
        keys = [[tuple(requests[n][1] + requests[n][2][:-1]) for n in batch] for batch in ours]
        assert [sorted(set(own)) if grouped else sorted(own) for own in keys] == asked
        assert Counter(n for batch in ours for n in batch) == Counter(range(60))


def test_texts_are_batched_by_how_they_go_on_and_how_long_they_are():
    requests = [("aa", {"until": ["x"]}), ("a", {"until": ["x"]}), ("b", {"until": ["y"]}), ("aaa", {"until": ["x"]})]
    assert batches_of_texts(requests, 2, len) == [[3, 0], [1], [2]]


def test_answers_come_in_the_order_of_questions():
    said = dealt(World(), [[2, 0], [1]], ["a", "b", "c"], lambda some: [text.upper() for text in some])
    assert said == ["A", "B", "C"]
