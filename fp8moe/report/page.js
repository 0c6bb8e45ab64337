"use strict";
// Draws the page's figures. Text and grid take their colours from the style sheet; heat maps are pixels, and are drawn
// again when the scheme changes.
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("screen and (prefers-color-scheme: dark)");
const PRINT_COLUMN = 322, PRINT_PAGE = 668; // CSS pixels of a figure on A4 and on Letter, in half and in full width
const config = { displayModeBar: false, responsive: true, displaylogo: false };
const axis = { automargin: true, gridcolor: "#8884", zerolinecolor: "#8886", linecolor: "#8886", ticks: "", title: { standoff: 8 } };

// From no tokens by way of an even share, which looks like the card, to many.
const loadColours = (isDark) =>
  isDark
    ? [[0, "#3f7cc4"], [1 / 3, "#232b36"], [0.6, "#a8602f"], [1, "#ffb27a"]]
    : [[0, "#2f6fb2"], [1 / 3, "#f1f3f6"], [0.6, "#e79a5f"], [1, "#a83c10"]];

function layoutOf(figure) {
  const { xaxis = {}, yaxis = {}, ...rest } = figure.layout;
  const merged = (own) => ({ ...axis, ...own, title: { ...axis.title, ...(own.title || {}) } });
  const lines = figure.data.filter((trace) => trace.name && trace.showlegend !== false).length;
  const isNarrow = innerWidth < 600;
  return {
    height: 280 + (isNarrow && lines > 3 ? 18 * lines : 0),
    margin: { l: 12, r: 12, t: 10, b: 10 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "#7c8794" },
    hoverlabel: { font: { size: 12 }, align: "left", namelength: -1 },
    showlegend: lines > 1,
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: 12 }, traceorder: "normal" },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    ...rest,
    xaxis: merged(xaxis),
    yaxis: merged(yaxis),
  };
}

function coloured(figure, isDark) {
  return figure.data.map((trace) => (trace.type === "heatmap" ? { ...trace, colorscale: loadColours(isDark) } : trace));
}

for (const figure of figures) {
  Plotly.newPlot(figure.name, coloured(figure, dark.matches), layoutOf(figure), config);
}

for (const input of document.querySelectorAll(".slider input")) {
  const figure = figures.find((one) => one.name === input.dataset.of);
  input.addEventListener("input", () => {
    const frame = figure.frames[Number(input.value)];
    input.nextElementSibling.textContent = frame.label;
    Plotly.restyle(figure.name, { z: [frame.z] });
  });
}

function recolour(isDark) {
  for (const figure of figures.filter((one) => one.data[0].type === "heatmap")) {
    Plotly.restyle(figure.name, { colorscale: [loadColours(isDark)] });
  }
}
dark.addEventListener("change", () => recolour(dark.matches));

addEventListener("beforeprint", () => {
  recolour(false);
  for (const figure of figures) {
    Plotly.relayout(figure.name, { width: figure.wide ? PRINT_PAGE : PRINT_COLUMN });
  }
});
addEventListener("afterprint", () => {
  recolour(dark.matches);
  for (const figure of figures) Plotly.relayout(figure.name, { width: null, autosize: true });
});
