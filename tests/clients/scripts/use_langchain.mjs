import assert from "node:assert/strict";
import { ChatOpenAI, OpenAI, OpenAIEmbeddings } from "@langchain/openai";
import {
  ANSWER, CITY_SCHEMA, KEY, LARGE_PROMPT, LONG_TASK, MODEL, QUESTION, SYSTEM, TIMEOUT_S, TOO_LARGE_PROMPT, URL,
  WEATHER_TOOL, run, throws,
} from "./calls.mjs";

const PLACE = { apiKey: KEY, configuration: { baseURL: URL } };
const OPTIONS = { ...PLACE, model: MODEL, maxRetries: 0, timeout: TIMEOUT_S * 1000, maxTokens: 24 };
const MESSAGES = [["system", SYSTEM], ["human", QUESTION]];
const greedy = (options = {}) => new ChatOpenAI({ ...OPTIONS, temperature: 0, ...options });
const warm = (options = {}) => new ChatOpenAI({ ...OPTIONS, temperature: 1, ...options });

async function streamed(model) {
  const pieces = [];
  for await (const piece of await model.stream(MESSAGES)) pieces.push(piece);
  return pieces;
}

const calls = {
  async chat() {
    const answer = await greedy().invoke(MESSAGES);
    assert.ok(answer.content.includes(ANSWER));
    assert.ok(answer.usage_metadata.output_tokens > 0);
  },
  async stream() {
    const text = (await streamed(greedy())).map((piece) => piece.content).join("");
    assert.equal(text, (await greedy().invoke(MESSAGES)).content);
  },
  async async() {
    const answers = await greedy().batch([MESSAGES, MESSAGES, MESSAGES]);
    assert.equal(new Set(answers.map((answer) => answer.content)).size, 1);
  },
  async completions() {
    const model = new OpenAI({ ...OPTIONS, maxTokens: 4, temperature: 0 });
    assert.ok((await model.invoke("The capital of France is")).includes(ANSWER));
  },
  async logprobs() {
    const answer = await greedy({ logprobs: true, topLogprobs: 3 }).invoke(MESSAGES);
    const tokens = answer.response_metadata.logprobs.content;
    assert.ok(tokens.every((token) => token.top_logprobs.length === 3));
  },
  async n() {
    const { generations } = await warm({ n: 3 }).generate([[["human", LONG_TASK]]], { seed: 1 });
    assert.equal(new Set(generations[0].map((choice) => choice.text)).size, 3);
  },
  async stop() {
    assert.equal((await greedy().invoke(MESSAGES, { stop: [" is"] })).content, "The capital of France");
  },
  async seed() {
    const texts = [];
    for (const seed of [1, 1, 2]) texts.push((await warm().invoke(LONG_TASK, { seed })).content);
    assert.equal(texts[0], texts[1]);
    assert.notEqual(texts[1], texts[2]);
  },
  async stream_usage() {
    const counted = (await streamed(greedy({ streamUsage: true }))).filter((piece) => piece.usage_metadata);
    const whole = await greedy().invoke(MESSAGES);
    assert.equal(counted.at(-1).usage_metadata.output_tokens, whole.usage_metadata.output_tokens);
  },
  async tools_auto() {
    const answer = await greedy().bindTools([WEATHER_TOOL]).invoke(MESSAGES);
    assert.ok(answer.content);
    assert.equal(answer.tool_calls.length, 0);
  },
  async tool_choice() {
    for (const tool_choice of ["required", "get_weather"]) {
      const answer = await greedy().bindTools([WEATHER_TOOL], { tool_choice }).invoke(MESSAGES);
      assert.ok("city" in answer.tool_calls[0].args);
    }
  },
  async json_schema() {
    const model = greedy({ maxTokens: 200 }).withStructuredOutput(
      { title: "city", ...CITY_SCHEMA }, { method: "jsonSchema", name: "city" });
    assert.equal(typeof (await model.invoke(MESSAGES)).inhabitants, "number");
  },
  async constraint() {
    const model = greedy({ modelKwargs: { structured_outputs: { choice: ["yes", "no"] } } });
    assert.ok(["yes", "no"].includes((await model.invoke(MESSAGES)).content));
  },
  async embeddings() {
    const model = new OpenAIEmbeddings({ ...PLACE, model: MODEL, maxRetries: 0 });
    assert.ok((await model.embedQuery("a")).length);
  },
  async responses() {
    assert.ok((await greedy({ useResponsesApi: true }).invoke(MESSAGES)).text);
  },
  async wrong_model() {
    await throws(() => greedy({ model: "another" }).invoke(MESSAGES), told(404, "another"));
  },
  async wrong_key() {
    await throws(() => greedy({ apiKey: "wrong" }).invoke(MESSAGES), told(401, "API key"));
  },
  async timeout() {
    await throws(() => warm({ timeout: 200, maxTokens: 4000 }).invoke(LONG_TASK), (error) =>
      /time/i.test(`${error.name} ${error.message}`));
    await calls.chat();
  },
  async disconnect() {
    for await (const _ of await warm({ maxTokens: 4000 }).stream(LONG_TASK)) break;
    await calls.chat();
  },
  async large_prompt() {
    assert.ok((await greedy().invoke(LARGE_PROMPT)).usage_metadata.input_tokens > 2000);
  },
  async too_large() {
    await throws(() => greedy().invoke(TOO_LARGE_PROMPT), (error) =>
      error.name === "ContextOverflowError");
  },
};

const told = (status, word) => (error) => error.status === status && error.message.includes(word);
await run(
  "@langchain/openai",
  calls,
  {
    tool_choice: told(400, "tool_choice"),
    json_schema: told(400, "response_format"),
    constraint: told(400, "structured_outputs"),
    embeddings: told(404, "/v1/embeddings"),
    responses: told(404, "/v1/responses"),
  },
  { messages: "not its interface", models: "lists no models" },
);
