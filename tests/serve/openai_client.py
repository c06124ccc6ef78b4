"""The server through the official OpenAI client, unmodified: what that client's users rely on.

    pip install openai
    redraft serve --addr 127.0.0.1:8090 --api-key key &
    python3 tests/serve/openai_client.py http://127.0.0.1:8090/v1 key

Prints one line for each thing that it checked.
"""

import sys

import openai

url, key = sys.argv[1], sys.argv[2]
client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
model = client.models.list().data[0].id


def check(name: str, holds: bool, seen: object = "") -> None:
    if not holds:
        sys.exit(f"FAILED {name}: {seen}")
    print(f"ok {name}")


def write(**options):
    return client.completions.create(**{"model": model, "prompt": "Once upon a time", "max_tokens": 40, "seed": 7, **options})


one, two = write(), write()
check("a seed twice gives one text", one.choices[0].text == two.choices[0].text, (one, two))
check("another seed gives another", write(seed=8).choices[0].text != one.choices[0].text)
check("usage", one.usage.total_tokens == one.usage.prompt_tokens + one.usage.completion_tokens, one.usage)
check("finish_reason", one.choices[0].finish_reason in ("stop", "length"), one)

three = write(n=3)
check("n = 3 gives three texts", len({choice.text for choice in three.choices}) == 3, three)
check("the first of them is that of n = 1", three.choices[0].text == one.choices[0].text)

chunks = list(write(stream=True, stream_options={"include_usage": True}))
text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
check("a stream joins to the text", text == one.choices[0].text, text)
check("its last chunk has the usage", chunks[-1].usage == one.usage, chunks[-1])

stopped = write(stop=["a", "e"])
check("stop", not set("ae") & set(stopped.choices[0].text) and stopped.choices[0].finish_reason == "stop", stopped)

greedy = [write(temperature=0, seed=seed).choices[0].text for seed in (1, 1)]
check("temperature 0 twice gives one text", greedy[0] == greedy[1])

with_log = write(logprobs=0).choices[0].logprobs
check("logprobs", len(with_log.tokens) == len(with_log.token_logprobs) and max(with_log.token_logprobs) <= 0, with_log)

extra = write(extra_body={"schedule": "did", "top_k": 50}).choices[0]
check("confidence comes beside the text", len(extra.redraft["confidence"]) == len(extra.redraft["tokens"]), extra)
snapshots = [chunk for chunk in write(stream=True, extra_body={"schedule": "did", "provisional": True}) if not chunk.choices]
check("provisional text", len(snapshots) > 0 and all(chunk.redraft["snapshot"]["text"] for chunk in snapshots))
filled = client.completions.create(model=model, prompt="", seed=1, extra_body={"infill": "The [____:3] sat on the mat."})
check("infill", filled.choices[0].text.endswith(" sat on the mat."), filled)

try:
    write(temperature="warm")
    check("a wrong value is refused", False)
except openai.BadRequestError as error:
    check("a wrong value is refused by its name", error.param == "temperature", error)
try:
    write(model="gpt-4")
    check("an unknown model is refused", False)
except openai.NotFoundError as error:
    check("an unknown model is refused", error.code == "model_not_found", error)
try:
    openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
    check("a wrong key is refused", False)
except openai.AuthenticationError as error:
    check("a wrong key is refused", error.code == "invalid_api_key", error)

try:
    message = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=8, seed=1)
    streamed = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=8, seed=1, stream=True
    )
    text = "".join(choice.delta.content or "" for chunk in streamed for choice in chunk.choices)
    check("a chat, whole and streamed", text == message.choices[0].message.content, (text, message))
except openai.BadRequestError as error:
    check("a model without a chat template says so", "chat template" in error.message, error)
