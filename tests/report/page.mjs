// What a browser does with a report: node page.mjs '{"file": ..., "width": ..., ...}' prints JSON.
//
// file: of the page; modules: a directory whose node_modules has playwright-core; chromium: its path; profile: a directory
// for this run alone; width: of the screen; dark: the colour scheme; print: as on paper; open:
// whether folded tables are unfolded; screenshot: a file to write, if any.

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const asked = JSON.parse(process.argv[2]);
const { chromium } = createRequire(`${asked.modules}/package.json`)("playwright-core");

const FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"];

/** Runs in the page: what does not fit, overlaps, or cannot be read. */
function look() {
  const screen = document.documentElement.clientWidth;
  const name = (element) => `${element.tagName} ${element.textContent.slice(0, 40)}`;
  const wide = [...document.querySelectorAll("body *")]
    .filter((element) => !element.closest(".scroll, svg"))
    .filter((element) => element.getBoundingClientRect().right > screen + 0.5)
    .map(name);

  const channel = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const luminance = (colour) => {
    const [red, green, blue] = colour.match(/[\d.]+/g).map((part) => channel(part / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const contrast = (one, other) => {
    const [less, more] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (more + 0.05) / (less + 0.05);
  };
  const paper = getComputedStyle(document.body).backgroundColor;
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (!/, 0\)$/.test(colour)) return colour;
    }
    return paper;
  };
  const faint = [];
  for (const element of document.querySelectorAll("h1, h2, h3, p, li, dt, dd, th, td, figcaption, summary, a, pre, footer"))
    if (element.textContent.trim() && element.checkVisibility() && contrast(getComputedStyle(element).color, behind(element)) < 4.5)
      faint.push(name(element));
  // Marks on coloured cells are in the paper's colour.
  const texts = [...document.querySelectorAll("svg text")].filter((text) => !text.getAttribute("style").includes("--paper"));
  for (const text of texts) if (contrast(getComputedStyle(text).fill, behind(text)) < 4.5) faint.push(name(text));

  const overlapping = [];
  const outside = [];
  let smallest = Infinity;
  for (const chart of document.querySelectorAll("svg")) {
    const frame = chart.getBoundingClientRect();
    const title = chart.querySelector("title").textContent;
    const scale = frame.width / chart.viewBox.baseVal.width;
    const boxes = [...chart.querySelectorAll("text")].map((text) => ({ text, box: text.getBoundingClientRect() }));
    for (const { text, box } of boxes) {
      smallest = Math.min(smallest, scale * parseFloat(getComputedStyle(text).fontSize));
      const over = [frame.left - box.left, box.right - frame.right, frame.top - box.top, box.bottom - frame.bottom];
      if (Math.max(...over) > 2) outside.push(`${title}: ${text.textContent}`);
    }
    for (const [index, one] of boxes.entries())
      for (const other of boxes.slice(index + 1)) {
        const across = Math.min(one.box.right, other.box.right) - Math.max(one.box.left, other.box.left);
        const down = Math.min(one.box.bottom, other.box.bottom) - Math.max(one.box.top, other.box.top);
        if (across > 1 && down > 0.3 * Math.min(one.box.height, other.box.height))
          overlapping.push(`${title}: ${one.text.textContent} / ${other.text.textContent}`);
      }
  }
  return {
    overflow: document.documentElement.scrollWidth - screen,
    paper: luminance(paper),
    charts: document.querySelectorAll("svg").length,
    wide,
    faint,
    overlapping,
    outside,
    smallest,
  };
}

const context = await chromium.launchPersistentContext(asked.profile, {
  executablePath: asked.chromium,
  headless: true,
  args: FLAGS,
  viewport: { width: asked.width, height: 800 },
  colorScheme: asked.dark ? "dark" : "light",
  deviceScaleFactor: asked.scale ?? 1,
});
const page = context.pages()[0] ?? (await context.newPage());
const errors = [];
const requests = [];
page.on("console", (message) => errors.push(message.text()));
page.on("pageerror", (error) => errors.push(String(error)));
page.on("request", (request) => requests.push(request.url()));
try {
  await page.goto(pathToFileURL(asked.file).href);
  if (asked.print) await page.emulateMedia({ media: "print" });
  if (asked.open) await page.evaluate(() => document.querySelectorAll("details").forEach((each) => (each.open = true)));
  const seen = await page.evaluate(look);
  if (asked.screenshot) await page.screenshot({ path: asked.screenshot, fullPage: true });
  console.log(JSON.stringify({ ...seen, errors, requests }));
} finally {
  await context.close();
}
