// Prepares pictures as the page does: node web_prepare.mjs PREPARE_JS < cases; a line of base64 for each case.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const { fit, normalise } = await import(pathToFileURL(process.argv[2]));
for (const { rgba, width, height, preparation } of JSON.parse(readFileSync(0, "utf8"))) {
  const decoded = { data: Uint8ClampedArray.from(Buffer.from(rgba, "base64")), width, height, channels: 4 };
  const values = normalise(fit(decoded, preparation), preparation);
  console.log(Buffer.from(values.buffer).toString("base64"));
}
