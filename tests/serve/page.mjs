// The page in headless Chromium: it loads, streams, remasks, fills holes, shows an error, works with
// the keyboard and on a narrow screen, and asks no other host for anything.
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
await page.click("#go");
await page.waitForFunction(() => document.getElementById("error").textContent !== "");
assert.match(await text("error"), /block/);
assert.equal(await page.getAttribute("#error", "role"), "alert");
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

// A phone: nothing is wider than the screen; all controls have names.
await page.setViewportSize({ width: 360, height: 740 });
assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "no sideways scrolling");
const nameless = await page.locator("input, select, textarea, button").evaluateAll(all =>
  all.filter(e => !(e.labels?.length || e.textContent.trim() || e.getAttribute("aria-label"))).map(e => e.id));
assert.deepEqual(nameless, []);
ok("fits a phone, and every control has a name");

assert.deepEqual(errors, []);
assert.deepEqual(elsewhere, []);
ok("no error on the page, no request elsewhere");
await browser.close();
