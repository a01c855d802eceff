from __future__ import annotations

import asyncio

import dspy
from calls import KEY, LONG_TASK, MODEL, QUESTION, TIMEOUT_S, URL, Calls, raises

calls = Calls("dspy")


def lm(name=MODEL, key=KEY, temperature=0.0, max_tokens=48, timeout=TIMEOUT_S, **options):
    return dspy.LM(
        f"openai/{name}", api_base=URL, api_key=key, temperature=temperature, max_tokens=max_tokens,
        timeout=timeout, cache=False, num_retries=0, **options,
    )  # fmt: skip


@calls
def chat():
    assert lm()(QUESTION)[0]


@calls
def async_():
    async def three():
        one = lm()
        return await asyncio.gather(*(one.acall(QUESTION) for _ in range(3)))

    assert [answer[0] for answer in asyncio.run(three())] == [lm()(QUESTION)[0]] * 3


@calls
def completions():
    assert lm(model_type="text")(QUESTION)[0]


@calls
def n():
    assert len(set(lm(temperature=1.0, n=3)(LONG_TASK))) == 3


@calls
def stop():
    whole = lm()(QUESTION)[0]
    end = f" {whole.split()[2]}"
    assert lm(stop=[end])(QUESTION)[0] == whole[: whole.index(end)]


@calls
def seed():
    texts = [lm(temperature=1.0, seed=seed)(LONG_TASK)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@calls
def wrong_model():
    with raises(Exception, "another", "does not exist"):
        lm("another")(QUESTION)


@calls
def wrong_key():
    with raises(Exception, "API key"):
        lm(key="wrong")(QUESTION)


@calls
def timeout():
    with raises(Exception, "imed out"):
        lm(timeout=0.2, max_tokens=4000, temperature=1.0)(LONG_TASK)
    chat()


calls.cannot(json_schema="asks for JSON in words, of models that it does not know")
calls.run()
