// The page in headless Chromium: it loads, streams, remasks, fills holes, shows an error, works with
// the keyboard, for a screen reader and on a narrow screen, and asks no other host for anything.
//
//   npm install --no-save playwright-core        # and Debian's chromium, or CHROMIUM=/path
//   redraft serve --addr 127.0.0.1:8091 &
//   node tests/serve/page.mjs http://127.0.0.1:8091/ [SCREENSHOT.png]
import assert from "node:assert/strict";
import { chromium } from "playwright-core";

const [url, screenshot] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
const page = await browser.newPage({ viewport: { width: 1100, height: 860 } });
const errors = [], elsewhere = [];
page.on("pageerror", error => errors.push(String(error)));
page.on("request", request => { if (!request.url().startsWith(url) && !request.url().startsWith("data:")) elsewhere.push(request.url()); });
const done = () => page.waitForFunction(() => document.getElementById("finish").textContent !== "–", null, { timeout: 60_000 });
const text = id => page.locator("#" + id).textContent();
const ok = name => console.log("ok " + name);


// What a screen reader is given: controls that all have a name, and regions that speak by themselves.
const devtools = await page.context().newCDPSession(page);
const accessible = async () => (await devtools.send("Accessibility.getFullAXTree")).nodes.filter(node => !node.ignored);
const CONTROLS = ["button", "tab", "textbox", "spinbutton", "combobox", "slider", "checkbox", "radio", "link", "DisclosureTriangle"];
const controls = async () => {
  const found = (await accessible()).filter(node => CONTROLS.includes(node.role.value));
  assert.deepEqual(found.filter(node => !node.name.value.trim()).map(node => node.role.value), [], "controls without a name");
  return found.map(node => `${node.role.value} ${node.name.value.trim()}`);
};
const spoken = async () => {
  const nodes = await accessible();
  const words = node => (node.childIds ?? []).map(id => nodes.find(child => child.nodeId === id)).filter(Boolean)
    .map(child => child.role.value === "StaticText" ? child.name.value : words(child)).join("");
  const lives = nodes.filter(node => node.properties?.some(({ name, value }) => name === "live" && value.value !== "off"));
  return lives.map(words).filter(Boolean);
};
const plain = words => words.replace(/\s+/g, " ").trim();
// Everything that the regions have said since the last call.
await page.addInitScript(() => addEventListener("DOMContentLoaded", () => {
  window.said = [];
  for (const region of document.querySelectorAll("[aria-live], [role=alert], [role=status], output")) {
    new MutationObserver(() => region.textContent && window.said.push(region.textContent)).observe(region, { childList: true, characterData: true, subtree: true });
  }
}));
const said = () => page.evaluate(() => window.said.splice(0));

await page.goto(url);
assert.match(await text("model"), /redraft/);
assert.equal(await page.title(), "redraft");
ok("loads");

// Every step is shown: masks appear and go, tokens are tinted.
await page.selectOption("#preset", "did");
await page.fill("#length", "60");
await page.fill("#seed", "10");
await page.locator("#speed").evaluate(input => { input.value = 0; });
await page.click("#go");
let masked = 0;
for (let i = 0; i < 400 && !(await page.locator("#finish").textContent()).match(/[a-z]/); i++) {
  masked = Math.max(masked, await page.locator("#text .masked").count());
}
await done();
await page.waitForFunction(() => document.getElementById("after").getAttribute("aria-pressed") === "true", null, { timeout: 60_000 });
assert.equal(await page.locator("#text .token").count(), 60);
assert.ok(Number(await text("nfe")) > 60 && Number(await text("rows")) > 60);
assert.equal(await page.locator("#stages li").count(), 2);
const frames = Number(await page.getAttribute("#step", "max"));
assert.ok(frames > 60, `${frames} steps`);
const after = await text("text");
await page.click("#before");
assert.equal(await page.getAttribute("#before", "aria-pressed"), "true");
assert.equal(await page.locator("#text .masked").count(), 0);
await page.locator("#step").evaluate(input => { input.value = Number(input.value) + 1; input.dispatchEvent(new Event("input")); });
masked = Math.max(masked, await page.locator("#text .masked").count());
assert.ok(masked >= 20, `${masked} tokens were masked again`);
assert.ok(await page.locator("#text .token").evaluateAll(tokens => new Set(tokens.map(token => token.style.background)).size > 5), "tints");
await page.click("#after");
assert.equal(await text("text"), after);
assert.ok(await page.locator("#text .again").count() > 0, "what was masked again is marked");
ok("streams, remasks, and shows before and after");
if (screenshot) await page.screenshot({ path: screenshot });

// A screen reader hears that it is being written, that it is refined, and the whole text when it is
// final, but not every step.
const prompt = await page.inputValue("#prompt");
assert.deepEqual((await spoken()).map(plain), [plain(await text("said"))]);
const [writing, refining, finished, ...more] = await said();
assert.match(writing, /^Writing/);
assert.match(refining, /draft is written/);
assert.ok(finished.startsWith("Done: ") && finished.includes(after.slice(prompt.length).trim()), finished);
assert.deepEqual(more, []);
for (const control of ["textbox Prompt", "spinbutton Tokens", "combobox Schedule", "slider Step", "button Write", "button After"]) {
  assert.ok((await controls()).includes(control), control);
}
assert.match(await page.getAttribute("#step", "aria-valuetext"), /^\d+ of \d+, stage 2$/);
ok("names its controls and says what is finished");

// Final text that comes in many pieces is said as a whole too.
await page.selectOption("#preset", "draft");
await page.click("#go");
await done();
await page.waitForFunction(() => document.getElementById("after").getAttribute("aria-pressed") === "true", null, { timeout: 60_000 });
assert.ok((await text("said")).includes((await text("text")).slice(prompt.length).trim()), await text("said"));
await page.selectOption("#preset", "did");
ok("says a draft");

// The same seed gives the same text.
await page.click("#go");
await done();
await page.waitForFunction(() => document.getElementById("after").getAttribute("aria-pressed") === "true", null, { timeout: 60_000 });
assert.equal(await text("text"), after);
ok("a seed twice");

// Holes by the keyboard: the tabs with an arrow, words with the space bar.
await page.focus("#tab-write");
await page.keyboard.press("ArrowRight");
assert.equal(await page.getAttribute("#tab-fill", "aria-selected"), "true");
await page.fill("#whole", "One day, a little girl went to the park.");
const words = page.locator("#words button");
assert.ok((await controls()).includes("textbox Text"), "the text with holes has a name");
for (let i = 0; i < await words.count(); i++) {
  if (await words.nth(i).getAttribute("aria-pressed") === "true") await words.nth(i).click();
}
await words.nth(3).focus();
await page.keyboard.press("Space");
assert.equal(await words.nth(3).getAttribute("aria-pressed"), "true");
await page.click("#go");
await done();
await page.waitForFunction(() => document.getElementById("after").getAttribute("aria-pressed") === "true", null, { timeout: 60_000 });
const filled = await text("text");
assert.match(filled, /^One day, a .* girl went to the park\.$/s);
assert.equal(await page.locator("#text .given").count(), 2);
ok("fills a hole");

// What the server refuses is shown, and said.
await page.click("#tab-write");
await page.selectOption("#preset", "");
await page.fill("#stages-text", "block=banana");
await page.click("summary");
for (const control of ["textbox Stages, a semicolon between two", "textbox Sent as Authorization: Bearer"]) {
  assert.ok((await controls()).includes(control), control);
}
await page.click("#go");
await page.waitForFunction(() => document.getElementById("error").textContent !== "");
assert.match(await text("error"), /block/);
assert.equal(await page.getAttribute("#error", "role"), "alert");
assert.ok((await spoken()).map(plain).includes(plain(await text("error"))), "the error is said");
ok("shows an error");

// Stopped in mid-text, the page stays usable.
await page.selectOption("#preset", "draft");
await page.fill("#length", "900");
await page.click("#go");
await page.waitForFunction(() => !document.getElementById("stop").disabled);
await page.click("#stop");
await page.waitForFunction(() => document.getElementById("stop").disabled);
assert.equal(await text("error"), "");
ok("stops");

// By the keyboard alone: Tab reaches everything that can be used, in the order of the page.
const usable = await page.locator("input, select, textarea, button, summary, [tabindex='0']").evaluateAll(all =>
  all.filter(e => !e.disabled && e.tabIndex >= 0 && e.checkVisibility()).map(e => e.id || e.textContent));
await page.focus("#" + usable[0]);
const reached = [usable[0]];
while (reached.length < usable.length) {
  await page.keyboard.press("Tab");
  reached.push(await page.evaluate(() => document.activeElement.id || document.activeElement.textContent));
}
assert.deepEqual(reached, usable);
ok("is worked by the keyboard");

// A phone: nothing is wider than the screen.
await page.setViewportSize({ width: 360, height: 740 });
assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "no sideways scrolling");
ok("fits a phone");

assert.deepEqual(errors, []);
assert.deepEqual(elsewhere, []);
ok("no error on the page, no request elsewhere");
await browser.close();
