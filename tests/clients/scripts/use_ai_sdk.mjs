import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";
import {
  ANSWER, KEY, LARGE_PROMPT, LONG_TASK, MODEL, QUESTION, SYSTEM, TOO_LARGE_PROMPT, URL, run, throws,
} from "./calls.mjs";

const provider = (options = {}) =>
  createOpenAICompatible({
    name: "octavo", baseURL: URL, apiKey: KEY, includeUsage: true, supportsStructuredOutputs: true, ...options,
  });
const octavo = provider();
const GREEDY = {
  model: octavo(MODEL), system: SYSTEM, prompt: QUESTION, temperature: 0, maxOutputTokens: 24, maxRetries: 0,
};
const WARM = { ...GREEDY, prompt: LONG_TASK, temperature: 1 };
const ask = (changes = {}) => generateText({ ...GREEDY, ...changes });
const get_weather = tool({ description: "The weather in a city.", inputSchema: z.object({ city: z.string() }) });

async function streamed(asked) {
  const result = streamText({ ...asked, onError: () => {} });
  let text = "";
  for await (const piece of result.textStream) text += piece;
  return [text, await result.usage];
}

const calls = {
  async chat() {
    const answer = await ask();
    assert.ok(answer.text.includes(ANSWER));
    assert.ok(["stop", "length"].includes(answer.finishReason));
    assert.ok(answer.usage.outputTokens > 0);
  },
  async stream() {
    const [text] = await streamed(GREEDY);
    assert.equal(text, (await ask()).text);
  },
  async async() {
    const answers = await Promise.all([ask(), ask(), ask()]);
    assert.equal(new Set(answers.map((answer) => answer.text)).size, 1);
  },
  async completions() {
    const asked = { model: octavo.completionModel(MODEL), prompt: "The capital of France is", temperature: 0 };
    const { text } = await generateText({ ...asked, maxOutputTokens: 24, maxRetries: 0 });
    assert.ok(text);
  },
  async stop() {
    assert.equal((await ask({ stopSequences: [" is"] })).text, "The capital of France");
  },
  async seed() {
    const texts = [];
    for (const seed of [1, 1, 2]) texts.push((await generateText({ ...WARM, seed })).text);
    assert.equal(texts[0], texts[1]);
    assert.notEqual(texts[1], texts[2]);
  },
  async stream_usage() {
    const [, usage] = await streamed(GREEDY);
    assert.equal(usage.outputTokens, (await ask()).usage.outputTokens);
  },
  async tools_auto() {
    const answer = await ask({ tools: { get_weather } });
    assert.ok(answer.text);
    assert.equal(answer.toolCalls.length, 0);
  },
  async tool_choice() {
    for (const toolChoice of ["required", { type: "tool", toolName: "get_weather" }]) {
      const [call] = (await ask({ tools: { get_weather }, toolChoice })).toolCalls;
      assert.ok("city" in call.input);
    }
  },
  async json_schema() {
    const schema = z.object({ city: z.string(), inhabitants: z.number().int() });
    const { object } = await generateObject({ ...GREEDY, schema, maxOutputTokens: 200 });
    assert.equal(typeof object.inhabitants, "number");
  },
  async constraint() {
    const providerOptions = { octavo: { structured_outputs: { choice: ["yes", "no"] } } };
    assert.ok(["yes", "no"].includes((await ask({ providerOptions })).text));
  },
  async embeddings() {
    const { embed } = await import("ai");
    assert.ok((await embed({ model: octavo.textEmbeddingModel(MODEL), value: "a", maxRetries: 0 })).embedding);
  },
  async wrong_model() {
    await throws(() => ask({ model: octavo("another") }), told(404, "model_not_found"));
  },
  async wrong_key() {
    await throws(() => ask({ model: provider({ apiKey: "wrong" })(MODEL) }), told(401, "invalid_api_key"));
  },
  async timeout() {
    const abortSignal = AbortSignal.timeout(200);
    await throws(() => generateText({ ...WARM, maxOutputTokens: 4000, abortSignal }), (error) =>
      error.name === "TimeoutError");
    await calls.chat();
  },
  async disconnect() {
    const leaving = new AbortController();
    const { textStream } = streamText({ ...WARM, maxOutputTokens: 4000, abortSignal: leaving.signal });
    for await (const _ of textStream) break;
    leaving.abort();
    await calls.chat();
  },
  async large_prompt() {
    assert.ok((await ask({ prompt: LARGE_PROMPT })).usage.inputTokens > 2000);
  },
  async too_large() {
    await throws(() => ask({ prompt: TOO_LARGE_PROMPT }), told(400, "context_length_exceeded"));
  },
};

const told = (status, word) => (error) =>
  APICallError.isInstance(error) && error.statusCode === status && error.responseBody.includes(word);
await run(
  "ai",
  calls,
  {
    tool_choice: told(400, "tool_choice"),
    json_schema: told(400, "response_format"),
    constraint: told(400, "structured_outputs"),
    embeddings: told(404, "unknown_route"),
  },
  { n: "takes one choice", responses: "in another package", messages: "in another package", models: "lists no models" },
);
