import { readFileSync } from "node:fs";

// What the scripts for Node share; calls.py says what a script is.

export const URL = process.env.CLIENT_URL; // of the API, with /v1
export const KEY = process.env.CLIENT_KEY;
export const MODEL = process.env.CLIENT_MODEL;
const CALL_TIMEOUT_S = 300;
export const TIMEOUT_S = 240; // of a request, which a busy machine needs

export const SYSTEM = "You answer in one short sentence.";
export const QUESTION = "What is the capital of France?";
export const ANSWER = "Paris"; // in the default model's greedy answer
export const LONG_TASK = "Write a very long story about a lighthouse, its keeper and the sea.";
export const LARGE_PROMPT = "The sea was calm and the light was on. ".repeat(230) + QUESTION;
export const TOO_LARGE_PROMPT = "The sea was calm and the light was on. ".repeat(2000);
export const CITY_SCHEMA = {
  type: "object",
  properties: { city: { type: "string" }, inhabitants: { type: "integer" } },
  required: ["city", "inhabitants"],
  additionalProperties: false,
};
export const WEATHER_TOOL = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather in a city.",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};

// Makes the calls by name and prints their verdicts; of a call that may be refused, `refusals` has what tells it.
export async function run(of, calls, refusals = {}, cannot = {}) {
  const chosen = Object.keys(calls).filter((name) => process.argv.length < 3 || process.argv.includes(name));
  const { version } = JSON.parse(readFileSync(`${import.meta.dirname}/node_modules/${of}/package.json`, "utf8"));
  tell({ version, calls: [...chosen, ...Object.keys(cannot)] });
  for (const [call, detail] of Object.entries(cannot)) tell({ call, verdict: "cannot", detail });
  for (const call of chosen) {
    const [verdict, detail] = await attempt(calls[call], refusals[call]);
    tell({ call, verdict, detail });
  }
  process.exit(0);
}

// `wanted` must throw an error for which `told` is true.
export async function throws(wanted, told) {
  let error;
  try {
    await wanted();
  } catch (thrown) {
    error = thrown;
  }
  if (error === undefined) throw new Error("no error came");
  if (!told(error)) throw error;
}

async function attempt(call, told = () => false) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no end within ${CALL_TIMEOUT_S} s`)), CALL_TIMEOUT_S * 1000);
  });
  try {
    await Promise.race([call(), late]);
    return ["works", ""];
  } catch (error) {
    if (told(error)) return ["refused", `${error.name}: ${error.message}`.slice(0, 600)];
    console.error(error);
    return ["FAILS", `${error.name}: ${error.message}`.slice(0, 600)];
  } finally {
    clearTimeout(timer);
  }
}

function tell(line) {
  console.log(JSON.stringify(line));
}
