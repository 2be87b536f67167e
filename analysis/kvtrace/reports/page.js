// A chart is drawn when it comes near the window, its table filled when it is opened. Figures name colours as
// "$variable"; they are looked up anew whenever the reader's theme changes.
const THEME = matchMedia("(prefers-color-scheme: dark)");
const LIGHT = document.styleSheets[0].cssRules[0].style; // :root, which the dark theme overrides
const NARROW = 600;
const PAPER = "680px"; // what fits between the margins of A4 and Letter
const charts = [...document.querySelectorAll(".chart")];
const parsed = new Map();
function dataOf(panel) {
  if (!parsed.has(panel)) parsed.set(panel, JSON.parse(panel.querySelector('script[type="application/json"]').textContent));
  return parsed.get(panel);
}
function themed(value, style) {
  if (typeof value === "string" && value[0] === "$") return style.getPropertyValue("--" + value.slice(1)).trim();
  if (Array.isArray(value)) return value.map((item) => themed(item, style));
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, style)]));
  return value;
}
function draw(chart, style = getComputedStyle(document.documentElement)) {
  const { data, layout } = themed(dataOf(chart.parentElement).figure, style);
  if (innerWidth < NARROW)
    for (const part of [layout, ...Object.keys(layout).filter((key) => /^[xy]axis/.test(key)).map((key) => layout[key].title)])
      if (part?.font) part.font.size = 11;
  chart.dataset.drawn = "";
  Plotly.react(chart, data, layout, { responsive: true, displayModeBar: false });
}
const near = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries)
      if (isIntersecting) {
        near.unobserve(target);
        if (target.dataset.drawn === undefined) draw(target);
      }
  },
  { rootMargin: "600px 0px" },
);
charts.forEach((chart) => near.observe(chart));
function redraw() {
  charts.filter((chart) => chart.dataset.drawn !== undefined).forEach((chart) => draw(chart));
}
THEME.addEventListener("change", redraw);
addEventListener("beforeprint", () => {
  for (const chart of charts) {
    chart.style.width = PAPER;
    draw(chart, LIGHT); // paper is white
    Plotly.Plots.resize(chart);
  }
});
addEventListener("afterprint", () => {
  for (const chart of charts) {
    chart.style.width = "";
    draw(chart);
    Plotly.Plots.resize(chart);
  }
});

function cell(kind, text, right) {
  const made = document.createElement(kind);
  made.textContent = text;
  if (right) made.className = "number";
  return made;
}
function row(kind, texts, numeric) {
  const made = document.createElement("tr");
  made.append(...texts.map((text, column) => cell(kind, text, numeric[column])));
  return made;
}
function fill(details) {
  const place = details.querySelector(".scroll");
  if (place.firstChild) return;
  const { head, numeric, columns } = dataOf(details.parentElement);
  const table = document.createElement("table");
  table.createTHead().append(row("th", head, numeric));
  table.createTBody().append(...(columns[0] ?? []).map((_, at) => row("td", columns.map((column) => column[at]), numeric)));
  place.append(table);
}
for (const details of document.querySelectorAll("details"))
  details.addEventListener("toggle", () => details.open && fill(details));

const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
if (links.size) {
  const inView = new Set();
  const seen = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) inView[isIntersecting ? "add" : "delete"](target.id);
      const first = [...links.keys()].find((name) => inView.has(name));
      for (const [name, link] of links)
        if (name === first) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
    },
    { rootMargin: "-20% 0px -60% 0px" },
  );
  for (const name of links.keys()) seen.observe(document.getElementById(name));
}
