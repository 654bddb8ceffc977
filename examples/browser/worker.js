// The model, apart from the page, which stays usable while pictures are read and answered.

import { read, readsTruly } from "./preprocess.js";

const RUNTIME = "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs"; // fetches the .wasm beside it
let ort, session, settings, ranks;

/** What is answered to a message of the page: "load" before anything else. */
export async function handle({ kind, ...given }) {
  return kind === "load" ? load(given.folder) : answer(given.file, given.level);
}

/** Everything that will ever be fetched. */
async function load(folder) {
  if (!readsTruly()) {
    throw new Error(
      "this browser changes the pixels that a page reads (its protection from fingerprinting), and answers would be " +
        "wrong: allow this page to read canvases, or take another browser",
    );
  }
  settings = await (await fetched(`${folder}/preprocessing.json`)).json();
  ranks = await (await fetched(`${folder}/ranks.json`)).json();
  const graph = await (await fetched(`${folder}/model.onnx`)).arrayBuffer();
  try {
    ort = await import(RUNTIME);
  } catch {
    throw new Error("onnxruntime-web is not there: run `npm install` in the folder of this page, and load it again");
  }
  ort.env.wasm.numThreads = 1; // more would be workers out of reach of the page's policy
  session = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"] });
  if (session.inputNames.includes("level") !== Boolean(ranks.levels)) {
    throw new Error("model/ranks.json does not say the levels of the model's intervals: export it again");
  }
  return { ranks, likely: session.outputNames.includes("probabilities") };
}

async function fetched(url) {
  const response = await fetch(url);
  if (response.ok) return response;
  const file = new URL(url).pathname.split("/").slice(-2).join("/");
  throw new Error(`${file} is not there: run \`ordinalclip export RUN --out model\` in the folder of this page`);
}

/** What the model says of a picture, as a row of predict.py's table; low and high of models with intervals alone. */
async function answer(file, level) {
  let seen;
  try {
    seen = await read(file, settings);
  } catch (error) {
    throw new Error(`not a readable picture (${error.message || error.name})`);
  }
  const inputs = { pixel_values: new ort.Tensor("float32", seen.pixels, [1, 3, settings.size, settings.size]) };
  if (ranks.levels) inputs.level = new ort.Tensor("float32", [level], []);
  const found = await session.run(inputs);
  const numbers = Object.values(found).flatMap((tensor) => Array.from(tensor.data, Number));
  if (!numbers.every(Number.isFinite)) throw new Error("the model answers with a number that is not finite");
  const rank = Number(found.rank.data[0]);
  return {
    thumbnail: seen.thumbnail,
    value: found.value.data[0],
    name: ranks.names[rank],
    probability: found.probabilities ? found.probabilities.data[rank] : null,
    ends: found.low ? [found.low.data[0], found.high.data[0]] : null,
  };
}
