import assert from "node:assert/strict";
import OpenAI from "openai";
import {
  ANSWER, CITY_SCHEMA, KEY, LARGE_PROMPT, LONG_TASK, MODEL, QUESTION, SYSTEM, TIMEOUT_S, TOO_LARGE_PROMPT, URL,
  WEATHER_TOOL, run, throws,
} from "./calls.mjs";

const OPTIONS = { baseURL: URL, apiKey: KEY, maxRetries: 0, timeout: TIMEOUT_S * 1000 };
const client = new OpenAI(OPTIONS);
const GREEDY = {
  model: MODEL,
  messages: [{ role: "system", content: SYSTEM }, { role: "user", content: QUESTION }],
  max_tokens: 24,
  temperature: 0,
};
const WARM = { model: MODEL, messages: [{ role: "user", content: LONG_TASK }], max_tokens: 24, temperature: 1 };
const ask = (changes = {}) => client.chat.completions.create({ ...GREEDY, ...changes });
const text = async (changes) => (await ask(changes)).choices[0].message.content;

async function chunks(asked) {
  const all = [];
  for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) all.push(chunk);
  return all;
}

const calls = {
  async chat() {
    const answer = await ask();
    assert.ok(answer.choices[0].message.content.includes(ANSWER));
    assert.ok(["stop", "length"].includes(answer.choices[0].finish_reason));
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  },
  async stream() {
    const all = await chunks(GREEDY);
    assert.equal(all.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), await text());
    assert.ok(["stop", "length"].includes(all.at(-1).choices[0].finish_reason));
    const folded = await client.chat.completions.stream(GREEDY).finalContent();
    assert.equal(folded, await text());
  },
  async async() {
    const texts = await Promise.all([text(), text(), text()]);
    assert.equal(new Set(texts).size, 1);
  },
  async completions() {
    const prompt = ["The capital of France is", "One two three four"];
    const answer = await client.completions.create({ model: MODEL, prompt, max_tokens: 4, temperature: 0 });
    assert.ok(answer.choices[0].text.includes(ANSWER));
    assert.equal(answer.choices[1].index, 1);
  },
  async logprobs() {
    const [choice] = (await ask({ logprobs: true, top_logprobs: 3 })).choices;
    const tokens = choice.logprobs.content;
    assert.ok(tokens.map((token) => token.token).join("").startsWith(choice.message.content));
    assert.ok(tokens.every((token) => token.top_logprobs.length === 3));
  },
  async n() {
    const { choices } = await client.chat.completions.create({ ...WARM, n: 3, seed: 1 });
    assert.equal(new Set(choices.map((choice) => choice.message.content)).size, 3);
  },
  async stop() {
    assert.equal(await text({ stop: [" is"] }), "The capital of France");
  },
  async seed() {
    const texts = [];
    for (const seed of [1, 1, 2]) texts.push(await text({ ...WARM, seed }));
    assert.equal(texts[0], texts[1]);
    assert.notEqual(texts[1], texts[2]);
  },
  async stream_usage() {
    const all = await chunks({ ...GREEDY, stream_options: { include_usage: true } });
    assert.deepEqual(all.at(-1).choices, []);
    assert.equal(all.at(-1).usage.completion_tokens, (await ask()).usage.completion_tokens);
  },
  async tools_auto() {
    assert.ok(await text({ tools: [WEATHER_TOOL] }));
    assert.ok(await text({ tools: [WEATHER_TOOL], tool_choice: "auto" }));
  },
  async tool_choice() {
    for (const tool_choice of ["required", { type: "function", function: { name: "get_weather" } }]) {
      const { message } = (await ask({ tools: [WEATHER_TOOL], tool_choice })).choices[0];
      assert.ok("city" in JSON.parse(message.tool_calls[0].function.arguments));
    }
  },
  async json_schema() {
    const json_schema = { name: "city", schema: CITY_SCHEMA, strict: true };
    const answer = await text({ response_format: { type: "json_schema", json_schema }, max_tokens: 200 });
    assert.equal(typeof JSON.parse(answer).inhabitants, "number");
  },
  async constraint() {
    const answer = await text({ structured_outputs: { choice: ["yes", "no"] } });
    assert.ok(["yes", "no"].includes(answer));
  },
  async embeddings() {
    assert.ok((await client.embeddings.create({ model: MODEL, input: "a" })).data[0].embedding);
  },
  async responses() {
    assert.ok((await client.responses.create({ model: MODEL, input: QUESTION })).output_text);
  },
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert.ok(ids.includes(MODEL));
    assert.equal((await client.models.retrieve(MODEL)).id, MODEL);
  },
  async wrong_model() {
    await throws(() => ask({ model: "another" }), (error) =>
      error instanceof OpenAI.NotFoundError && error.code === "model_not_found");
  },
  async wrong_key() {
    const stranger = new OpenAI({ ...OPTIONS, apiKey: "wrong" });
    await throws(() => stranger.models.list(), (error) =>
      error instanceof OpenAI.AuthenticationError && error.code === "invalid_api_key");
  },
  async timeout() {
    const asked = { ...WARM, max_tokens: 4000 };
    await throws(() => client.chat.completions.create(asked, { timeout: 200 }), (error) =>
      error instanceof OpenAI.APIConnectionTimeoutError);
    await calls.chat();
  },
  async disconnect() {
    const stream = await client.chat.completions.create({ ...WARM, max_tokens: 4000, stream: true });
    for await (const _ of stream) break;
    await calls.chat();
  },
  async large_prompt() {
    const answer = await ask({ messages: [{ role: "user", content: LARGE_PROMPT }] });
    assert.ok(answer.usage.prompt_tokens > 2000);
  },
  async too_large() {
    await throws(() => ask({ messages: [{ role: "user", content: TOO_LARGE_PROMPT }] }), (error) =>
      error instanceof OpenAI.BadRequestError && error.code === "context_length_exceeded");
  },
};

const bad = (word) => (error) => error instanceof OpenAI.BadRequestError && `${error.param}`.startsWith(word);
const unknown = (error) => error instanceof OpenAI.NotFoundError && error.code === "unknown_route";
await run(
  "openai",
  calls,
  {
    tool_choice: bad("tool_choice"),
    json_schema: bad("response_format"),
    constraint: bad("structured_outputs"),
    embeddings: unknown,
    responses: unknown,
  },
  { messages: "not its interface" },
);
