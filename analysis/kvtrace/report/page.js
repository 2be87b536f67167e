// Figures name colours as "$variable"; they are looked up anew whenever the reader's theme changes.
const THEME = matchMedia("(prefers-color-scheme: dark)");
function themed(value, style) {
  if (typeof value === "string" && value[0] === "$") return style.getPropertyValue("--" + value.slice(1)).trim();
  if (Array.isArray(value)) return value.map((item) => themed(item, style));
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, style)]));
  return value;
}
function draw() {
  const style = getComputedStyle(document.documentElement);
  FIGURES.forEach((figure, number) => {
    const { data, layout } = themed(figure, style);
    if (innerWidth < 600) for (const part of [layout, layout.xaxis.title, layout.yaxis.title]) part.font.size = 11;
    Plotly.react("chart-" + number, data, layout, { responsive: true, displayModeBar: false });
  });
}
THEME.addEventListener("change", draw);
draw();
