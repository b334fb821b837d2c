// What a browser does with the page of examples/web: node web_page.mjs '{"scenario": ..., "page": ..., ...}' prints JSON.
//
// page: the directory of the example, whose node_modules has playwright-core; chromium: its path; profile: a directory
// for this run alone; address: of the server; blocked: a glob of what cannot be fetched, if anything; screenshot: a file
// to write, if any.

import { createRequire } from "node:module";

const asked = JSON.parse(process.argv[2]);
const { chromium } = createRequire(`${asked.page}/package.json`)("playwright-core");

const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];
const rows = (page) =>
  page.$$eval("#steps li", (all) =>
    all.map((row) => ({
      leaves: Number(row.dataset.leaves),
      state: row.dataset.state,
      text: row.innerText.replaceAll("\u00a0", " "),
    })),
  );
const allAnswered = (page) =>
  page.waitForFunction(() => {
    if (document.querySelector("#steps").ariaBusy === "true") return false;
    const states = Array.from(document.querySelectorAll("#steps li"), (row) => row.dataset.state);
    return states.length && states.every((state) => state === "answered");
  });
const text = async (page, selector) => (await page.locator(selector).innerText()).replaceAll("\u00a0", " ");
const answer = (page) => text(page, "#answer");
const overflow = (page) =>
  page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
const focused = (page) =>
  page.evaluate(() => {
    const at = document.activeElement;
    const shown = at.type === "radio" ? at.nextElementSibling : at;
    const { outlineStyle, outlineWidth } = getComputedStyle(shown);
    const name =
      at.getAttribute("aria-label") ?? at.labels?.[0]?.innerText ?? at.querySelector("img")?.alt ?? at.innerText;
    return {
      what: at.id || at.value || at.tagName.toLowerCase(),
      name,
      outlined: outlineStyle !== "none" && parseFloat(outlineWidth) >= 2,
    };
  });

const scenarios = {
  /** Before and after the files that wait are released. */
  async first(page) {
    await page.waitForSelector("#steps li[data-state=answered]");
    await page.waitForTimeout(300);
    const before = { rows: await rows(page), answer: await answer(page), fetched: await text(page, "#fetched") };
    await fetch(`${asked.address}/release`, { method: "POST" });
    await allAnswered(page);
    return {
      before,
      after: { rows: await rows(page), answer: await answer(page), fetched: await text(page, "#fetched") },
    };
  },

  /** The logits of every step, of a picture of the network's own size. */
  async logits(page) {
    await allAnswered(page);
    const steps = await page.evaluate(
      async ([directory, picture]) => {
        const [ort, { Anytime }, { decode, fit, normalise }] = await Promise.all(
          ["/node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs", "/anytime.js", "/prepare.js"].map(
            (path) => import(path),
          ),
        );
        const model = await Anytime.open(directory, ort);
        const decoded = await decode(await (await fetch(picture)).blob());
        const { preparation } = model.manifest;
        const values = normalise(fit(decoded, preparation), preparation);
        const steps = [];
        for await (const { logits, ...rest } of model.anytime(values))
          steps.push({ ...rest, logits: Array.from(logits) });
        return steps;
      },
      [`/${asked.export}`, "/pictures/3.png"],
    );
    await page.click("img[alt='A scanned 3']");
    await allAnswered(page);
    return { steps, answer: await answer(page), rows: await rows(page) };
  },

  /** Every stop of the tab key, and a digit drawn and a scan chosen without a pointer. */
  async keyboard(page) {
    await allAnswered(page);
    const stops = [];
    const tab = async () => {
      await page.keyboard.press("Tab");
      const stop = await focused(page);
      stops.push(stop);
      return stop;
    };
    await tab();
    await page.keyboard.press("ArrowRight"); // the second way to get a picture: a drawing
    const drawing = await tab();
    const blank = await page.locator("#seen").evaluate((canvas) => canvas.toDataURL());
    await page.keyboard.press("Space");
    for (let step = 0; step < 8; step++) await page.keyboard.press("ArrowDown");
    const pen = await page.locator("#pen").innerText();
    await page.keyboard.press("Space");
    await allAnswered(page);
    const drawn = {
      pen,
      changed: blank !== (await page.locator("#seen").evaluate((canvas) => canvas.toDataURL())),
      answer: await answer(page),
    };
    await page.keyboard.press("Delete");
    const cleared = await answer(page);
    for (let stop = {}; stop.what !== "again" && stop.name !== "Fetch again" && stops.length < 20;) stop = await tab();
    await page.keyboard.press("Shift+Tab");
    while ((await focused(page)).what !== "drawing") await page.keyboard.press("Shift+Tab");
    await page.keyboard.press("ArrowLeft");
    await tab();
    await tab();
    await page.keyboard.press("Enter");
    await allAnswered(page);
    const pressed = await page.locator("#shipped [aria-pressed=true] img").getAttribute("alt");
    return { stops, drawing, drawn, cleared, pressed };
  },

  /** Whether a small screen needs to scroll sideways, with every kind of picture; and a digit drawn there. */
  async narrow(page) {
    await allAnswered(page);
    const overflows = { shipped: await overflow(page) };
    const small = await page.$$eval("button, select, .kinds label", (all) =>
      all
        .filter((one) => one.offsetParent && Math.min(one.offsetWidth, one.offsetHeight) < 32)
        .map((one) => one.innerText || one.id),
    );
    for (const kind of ["file", "drawing"]) {
      await page.check(`[name=kind][value=${kind}]`, { force: true });
      overflows[kind] = await overflow(page);
    }
    const { x, y, width, height } = await page.locator("#board").boundingBox();
    await page.mouse.move(x + 0.5 * width, y + 0.2 * height);
    await page.mouse.down();
    await page.mouse.move(x + 0.45 * width, y + 0.8 * height, { steps: 8 });
    await page.mouse.up();
    await allAnswered(page);
    const drawn = (await page.locator("#shipped [aria-pressed=true]").count()) === 0 && (await answer(page));
    return { overflows, small, drawn };
  },

  /** A file of this device, larger than the network's pictures. */
  async file(page) {
    await page.waitForSelector("#steps li");
    const kinds = await page.isVisible("#kinds");
    if (kinds) await page.check("[name=kind][value=file]", { force: true });
    await page.setInputFiles("#chosen", asked.file);
    await page.waitForFunction((size) => document.querySelector("#seen-size").innerText === size, asked.size);
    await allAnswered(page);
    return { answer: await answer(page), kinds, pressed: await page.locator("#shipped [aria-pressed=true]").count() };
  },

  /** What is said of an export that is not right. */
  async problem(page) {
    await page.waitForSelector("#problem:not([hidden])");
    return { problem: await page.locator("#problem").innerText(), rows: await rows(page) };
  },

  /** The page while the last file is on its way, over a slow connection. */
  async underway(page) {
    await allAnswered(page);
    await page.selectOption("#connection", { label: "1 Mbit/s" });
    await page.click("#again button");
    const { length } = await rows(page);
    await page.waitForSelector(`#steps li:nth-child(${length - 1})[data-state=answered]`);
    await page.waitForSelector(`#steps li:nth-child(${length})[data-state=fetching]`);
    await page.waitForTimeout(asked.pause ?? 0);
    return { rows: await rows(page), answer: await answer(page) };
  },
};

const { width = 1000, height = 720, dark = false } = asked;
const context = await chromium.launchPersistentContext(asked.profile, {
  executablePath: asked.chromium,
  headless: true,
  args: FLAGS,
  viewport: { width, height },
  colorScheme: dark ? "dark" : "light",
  deviceScaleFactor: asked.scale ?? 1,
});
const page = context.pages()[0] ?? (await context.newPage());
page.setDefaultTimeout(90_000);
const errors = [];
const requests = [];
page.on("console", (message) => ["error", "warning"].includes(message.type()) && errors.push(message.text()));
page.on("pageerror", (error) => errors.push(String(error)));
page.on("request", (request) => requests.push(request.url()));
if (asked.blocked) await page.route(asked.blocked, (route) => route.abort());
try {
  await page.goto(`${asked.address}/?export=${asked.export}`);
  const report = await scenarios[asked.scenario](page);
  if (asked.screenshot) {
    await page.waitForTimeout(asked.settle ?? 0);
    await page.screenshot({ path: asked.screenshot, fullPage: true });
  }
  console.log(JSON.stringify({ ...report, errors, requests }));
} catch (error) {
  console.log(
    JSON.stringify({ failed: String(error), answer: await answer(page), rows: await rows(page), errors, requests }),
  );
} finally {
  await context.close();
}
