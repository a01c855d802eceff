"""Evaluations of a few documents: choices by log-likelihood, and texts, of completions and of chats."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path

os.environ["OPENAI_API_KEY"] = os.environ["CLIENT_KEY"]

import lm_eval
import requests
from calls import KEY, MODEL, TIMEOUT_S, URL, Calls, raises
from lm_eval.tasks import TaskManager

TOKENIZER = os.environ["CLIENT_TOKENIZER"]
DOCUMENTS = [
    {"question": "The capital of France is", "choices": [" Paris", " London", " a fish"], "answer": 0},
    {"question": "Two plus two equals", "choices": [" seven trees", " four"], "answer": 1},
    {"question": "The sun rises in the", "choices": [" east", " spoon"], "answer": 0},
    {"question": "One, two, three, four,", "choices": [" nine", " five"], "answer": 1},
]
FOLDER = Path(tempfile.mkdtemp())
FIELDS = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(FOLDER / "documents.json")}},
    "test_split": "test",
    "doc_to_text": "{{question}}",
}
CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
TEXTS = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
calls = Calls("lm-eval")


def evaluate(task, route, **model):
    """The samples of a task, by document."""
    (FOLDER / "documents.json").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (FOLDER / "task.yaml").write_text(json.dumps({"task": "octavo", **FIELDS, **task}))
    chat = route == "chat"
    arguments = {
        "model": MODEL,
        "base_url": f"{URL}/{'chat/completions' if chat else 'completions'}",
        "tokenizer": TOKENIZER,
        "tokenizer_backend": None if chat else "huggingface",
        "num_concurrent": 2,
        "max_retries": 1,
        "timeout": TIMEOUT_S,
        **model,
    }
    results = lm_eval.simple_evaluate(
        model=f"local-{'chat-' if chat else ''}completions",
        model_args=arguments,
        tasks=["octavo"],
        task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    return sorted(results["samples"]["octavo"], key=lambda sample: sample["doc_id"]), results


def echoed(text):
    """The log-probabilities of a text's tokens, and where each begins, as Octavo gives them to anyone."""
    body = {"model": MODEL, "prompt": text, "max_tokens": 1, "echo": True, "logprobs": 0, "temperature": 0}
    answer = requests.post(
        f"{URL}/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=TIMEOUT_S
    )
    return answer.json()["choices"][0]["logprobs"]


@calls
def chat():
    samples, _ = evaluate(TEXTS, "chat")
    assert len(samples) == len(DOCUMENTS)
    assert all(sample["resps"][0][0].strip() for sample in samples)


@calls
def completions():
    for backend in ("huggingface", "auto"):
        samples, _ = evaluate(TEXTS, "completions", tokenizer_backend=backend)
        texts = [sample["resps"][0][0] for sample in samples]
        assert "Paris" in texts[0]
        assert not any("\n" in text for text in texts)


@calls
def logprobs():
    samples, results = evaluate(CHOICES, "completions")
    assert results["results"]["octavo"]["acc,none"] == 1.0
    for sample, document in zip(samples, DOCUMENTS, strict=True):
        for choice, ((likelihood, _),) in zip(document["choices"], sample["resps"], strict=True):
            told = echoed(document["question"] + choice)
            begin, end = len(document["question"]), len(document["question"] + choice)
            of_choice = [
                logprob
                for logprob, offset in zip(told["token_logprobs"], told["text_offset"], strict=True)
                if begin <= offset < end
            ]
            assert math.isclose(float(likelihood), sum(of_choice), abs_tol=1e-3), (
                choice,
                likelihood,
                of_choice,
            )


@calls
def wrong_model():
    with raises(Exception, "404"):
        evaluate(TEXTS, "completions", model="another")


@calls
def wrong_key():
    os.environ["OPENAI_API_KEY"] = "wrong"
    try:
        with raises(Exception, "401"):
            evaluate(TEXTS, "completions")
    finally:
        os.environ["OPENAI_API_KEY"] = KEY


calls.cannot(stream="reads whole answers")
calls.run()
