"use strict";
// What is shown is `state`. A click changes it by show(…), which draws everything again.
const data = JSON.parse(document.getElementById("data").textContent);
const MANY_LAYERS = 40; // from which on the page begins with heat maps
const FEW_RECORDS = 40; // up to which every record has a marker
const ALL = data.layers.map((_, i) => i);
const TRACKED = ALL.filter((i) => data.tracked[i]);
const everything = { layers: null, steps: null, finding: null }; // null: all layers, all steps, none
const state = { ...everything, untracked: TRACKED.length === 0, view: "lines" };
if (shownLayers().length > MANY_LAYERS) state.view = "heat";
let printing = false;

/** Indices of the layers in the plots. */
function shownLayers() {
  return state.layers ?? (state.untracked ? ALL : TRACKED);
}

const THEMES = {
  light: { ink: "#1f2328", faint: "#656d76", grid: "#e6e9ed", paper: "#ffffff", finding: "#0072b2" },
  dark: { ink: "#e6edf3", faint: "#9198a1", grid: "#2a3038", paper: "#0d1117", finding: "#56b4e9" },
};
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const themeName = () => (prefersDark.matches && !printing ? "dark" : "light");

// Numbers and names

/** Three significant digits, as Python's format(value, ".3g") writes them. */
function short(value) {
  if (value === null) return "–";
  if (value === 0) return "0";
  const rounded = Number(value.toPrecision(3));
  const size = Math.floor(Math.log10(Math.abs(rounded)));
  if (size >= -4 && size < 3) return String(rounded);
  return rounded.toExponential().replace(/e([+-])(\d)$/, "e$10$2");
}

/** Text for plotly, which reads some HTML in its labels. */
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const cut = (text, length) => (text.length > length ? "…" + text.slice(1 - length) : text);
const usable = (value, log) => value !== null && (value > 0 || !log);

// Axes

/** [low, high] of what is drawn: of these rows of values, at the steps that are shown. */
function reach(rows, log) {
  let low = Infinity;
  let high = -Infinity;
  const [first, last] = state.steps ?? [-Infinity, Infinity];
  for (const row of rows) {
    row.forEach((value, t) => {
      if (usable(value, log) && data.steps[t] >= first && data.steps[t] <= last) {
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    });
  }
  if (low > high) return null;
  const margin = Math.max(1.3, (high / low) ** 0.04);
  return log ? [low / margin, high * margin] : [Math.min(low, 0), high > 0 ? high * 1.05 : 1];
}

/** At most so many values to label on a log axis. */
function logTicks(range, most) {
  const ticks = niceValues(range);
  return ticks.filter((_, i) => i % Math.ceil(ticks.length / most) === 0);
}

/** Decades if there are several, else 1, 2 and 5 of each, else evenly spaced values. */
function niceValues([low, high]) {
  const decades = Math.log10(high / low);
  if (decades < 0.6) {
    const step = 10 ** Math.floor(Math.log10(high - low)) / 2;
    const wide = (high - low) / step > 8 ? 2 * step : step;
    const count = Math.floor(high / wide) - Math.ceil(low / wide) + 1;
    return Array.from({ length: count }, (_, i) => (Math.ceil(low / wide) + i) * wide);
  }
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const digit of decades < 2.5 ? [1, 2, 5] : [1]) ticks.push(digit * 10 ** power);
  }
  return ticks.filter((value) => value >= low && value <= high);
}

function stepAxis(theme) {
  const [first, last] = state.steps ?? [data.steps[0], data.steps.at(-1)];
  const margin = Math.max((last - first) * 0.01, 0.5);
  return {
    range: [first - margin, last + margin], title: { text: "step", standoff: 4 }, gridcolor: theme.grid,
    zeroline: false, nticks: 8, tickformat: "d", hoverformat: "d",
  };
}

// Panels

function line(name, values, color, panel, layer) {
  const known = (t) => usable(values[t] ?? null, panel.log);
  const joined = values.some((_, t) => known(t) && known(t + 1)); // else there is no line to be seen
  const dotted = layer !== undefined && TRACKED.length > 0 && !data.tracked[layer];
  return {
    type: "scatter", x: data.steps, y: values.map((v, t) => (known(t) ? v : null)),
    mode: !joined ? "markers" : data.steps.length <= FEW_RECORDS ? "lines+markers" : "lines",
    line: { color, width: 1.4, dash: dotted ? "dot" : "solid" }, marker: { color, size: joined ? 4 : 7 },
    name: escaped(name), meta: layer, text: values.map(short), showlegend: false,
    hovertemplate: "%{fullData.name}<br>step %{x}: %{text}<extra></extra>",
  };
}

function linesOf(panel, layers, theme) {
  if (panel.lines) {
    const showlegend = panel.lines.length > 1;
    return panel.lines.map((of) => ({ ...line(of.name, of.values, of.color ?? theme.ink, panel), showlegend }));
  }
  const colors = data.colors[themeName()];
  return layers.map((i) => line(data.layers[i], panel.values[i], colors[i], panel, i));
}

function linesFigure(panel, layers, theme) {
  const drawn = linesOf(panel, layers, theme);
  const range = reach(drawn.map((trace) => trace.y), panel.log);
  const type = panel.log ? "log" : "linear";
  const yaxis = { type, gridcolor: theme.grid, zeroline: false, fixedrange: true };
  if (range) {
    yaxis.range = panel.log ? range.map(Math.log10) : range;
    if (panel.log) {
      yaxis.tickvals = logTicks(range, 10);
      yaxis.ticktext = yaxis.tickvals.map(short);
    }
  }
  return { drawn, yaxis, height: panel.lines ? 190 : 300 };
}

function heatFigure(panel, layers, theme) {
  const rows = layers.map((i) => panel.values[i]);
  const range = reach(rows, panel.log) ?? [1, 10];
  const scale = panel.log ? Math.log10 : (v) => v;
  const height = Math.max(90, Math.min(560, 16 * layers.length));
  const most = Math.ceil(height / 40);
  const ticks = panel.log ? logTicks(range, most) : null;
  const every = Math.ceil(layers.length / 30);
  const labelled = layers.map((_, row) => row).filter((row) => row % every === 0);
  const drawn = [{
    type: "heatmap", x: data.steps, y: layers.map((_, row) => row), hoverongaps: false, colorscale: "Cividis",
    z: rows.map((row) => row.map((v) => (usable(v, panel.log) ? scale(v) : null))),
    zmin: scale(range[0]), zmax: scale(range[1]),
    text: rows.map((row, k) => row.map((v) => `${escaped(data.layers[layers[k]])}<br>step `)),
    customdata: rows.map((row) => row.map(short)),
    hovertemplate: "%{text}%{x}: %{customdata}<extra></extra>",
    colorbar: {
      thickness: 12, outlinewidth: 0, x: 1.01, xpad: 0,
      nticks: most, ...(ticks && { tickvals: ticks.map(Math.log10), ticktext: ticks.map(short) }),
    },
  }];
  const yaxis = {
    range: [layers.length - 0.5, -0.5], fixedrange: true, showgrid: false, zeroline: false,
    tickvals: labelled, ticktext: labelled.map((row) => escaped(cut(data.layers[layers[row]], 24))),
  };
  return { drawn, yaxis, height: height + 60 };
}

/** When a rule acted, when it handed over, and the steps of the finding that was clicked. */
function marks(theme, heat, withText) {
  const shapes = [];
  const annotations = [];
  const across = { xref: "x", yref: "paper", y0: 0, y1: 1 };
  const band = (x0, x1, color, opacity) => shapes.push(
    heat ? { ...across, type: "rect", x0, x1, line: { color, width: 2 } }
      : { ...across, type: "rect", x0, x1, fillcolor: color, opacity, line: { width: 0 }, layer: "below" },
  );
  for (const { first, last, handed_over: end } of data.rule) {
    if (end === null && first === data.steps[0]) continue; // all the time
    if (!heat) band(first, end ?? last, theme.faint, 0.12);
    if (end === null) continue;
    const dashed = { color: data.handOverColor, width: 1.5, dash: "dash" };
    shapes.push({ ...across, type: "line", x0: end, x1: end, line: dashed });
    if (withText && data.rule.length <= 4) {
      annotations.push({
        x: end, y: 1, xref: "x", yref: "paper", xanchor: "left", yanchor: "bottom", showarrow: false,
        text: "handed over", font: { size: 11, color: data.handOverColor },
      });
    }
  }
  if (state.finding !== null) {
    const [first, last] = data.findings[state.finding].steps;
    band(first - 0.5, last + 0.5, heat ? THEMES.dark.finding : theme.finding, 0.13);
  }
  return { shapes, annotations };
}

function draw(panel, index) {
  const theme = THEMES[themeName()];
  const layers = shownLayers();
  const maps = state.view === "heat" && layers.length > 1; // a single layer is seen better as a line
  const heat = maps && panel.values;
  const { drawn, yaxis, height } = (heat ? heatFigure : linesFigure)(panel, layers, theme);
  const layout = {
    height, ...(printing ? { width: 690 } : { autosize: true }),
    margin: { l: maps ? 165 : 66, r: maps ? 78 : 12, t: 20, b: 40 }, // equal, so that steps are one below the other
    xaxis: stepAxis(theme), yaxis, ...marks(theme, heat, index === 0),
    paper_bgcolor: theme.paper, plot_bgcolor: theme.paper,
    font: { color: theme.ink, family: "system-ui, sans-serif", size: 12 },
    hovermode: "closest", hoverlabel: { namelength: -1 }, dragmode: "zoom",
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom" },
  };
  const config = {
    responsive: true, displaylogo: false, doubleClick: false,
    modeBarButtons: [["toImage"]],
    toImageButtonOptions: { filename: panel.title.replace(/\W+/g, "-"), scale: 2 },
  };
  return Plotly.react(panel.div, drawn, layout, config);
}

// What is shown

function show(change) {
  Object.assign(state, change);
  data.panels.forEach(draw);
  const layers = shownLayers();
  const steps = state.steps ? `, steps ${Math.ceil(state.steps[0])} to ${Math.floor(state.steps[1])}` : "";
  const which = layers.length === 1 ? data.layers[layers[0]] : `${layers.length} of ${ALL.length} layers`;
  document.getElementById("shown").textContent = which + steps;
  document.getElementById("reset").hidden = !state.layers && !state.steps;
  press("[data-view]", ({ view }) => view === state.view);
  press("[data-layer]", ({ layer }) => state.layers?.includes(Number(layer)) ?? false);
  press("[data-finding]", ({ finding }) => Number(finding) === state.finding);
  const chosen = state.finding === null ? state.layers : null; // a finding is shown among the others
  const concerns = (of) => !chosen || of.layers.length === 0 || chosen.some((i) => of.layers.includes(i));
  for (const button of document.querySelectorAll("[data-finding]")) {
    button.parentElement.hidden = !concerns(data.findings[button.dataset.finding]);
  }
  document.getElementById("no-finding").hidden = data.findings.some(concerns);
}

/** Mark the buttons that are pressed. */
function press(selector, isPressed) {
  for (const button of document.querySelectorAll(selector)) {
    button.setAttribute("aria-pressed", String(isPressed(button.dataset)));
  }
}

/** This layer alone; together with those that are shown already if `more`. */
function showLayer(layer, more) {
  const before = more && state.finding === null ? (state.layers ?? []) : [];
  const layers = before.includes(layer) ? before.filter((i) => i !== layer) : [...before, layer];
  show({ layers: layers.length ? layers.sort((a, b) => a - b) : null, finding: null });
  document.querySelector(`[data-layer="${layer}"]`).scrollIntoView({ block: "nearest" });
}

/** The steps of a finding, with some before and after them, and its layers. */
function showFinding(index) {
  const { steps: [first, last], layers } = data.findings[index];
  const before = data.steps.filter((step) => step < first);
  const after = data.steps.filter((step) => step > last);
  const around = Math.max(3, Math.ceil(0.25 * (data.steps.length - before.length - after.length)));
  const steps = [before.at(-around) ?? data.steps[0], after[around - 1] ?? data.steps.at(-1)];
  show({ finding: index, layers: layers.length ? layers : null, steps });
}

function build() {
  const plots = document.getElementById("plots");
  for (const panel of data.panels) {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = panel.title[0].toUpperCase() + panel.title.slice(1);
    if (panel.about) caption.textContent += `: ${panel.about}`;
    panel.div = document.createElement("div");
    figure.append(caption, panel.div);
    plots.append(figure);
  }
  show({});
  for (const panel of data.panels) {
    panel.div.on("plotly_click", ({ points: [point], event }) => {
      const layer = point.data.type === "heatmap" ? shownLayers()[point.y] : point.data.meta;
      if (layer !== undefined) showLayer(layer, event.ctrlKey || event.metaKey || event.shiftKey);
    });
    panel.div.on("plotly_relayout", (change) => {
      const steps = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      if (steps[0] !== undefined) show({ steps });
    });
    panel.div.on("plotly_doubleclick", () => show({ steps: null }));
  }
}

build();
const untracked = document.getElementById("untracked");
untracked.hidden = TRACKED.length === 0 || TRACKED.length === ALL.length;
untracked.addEventListener("change", (event) => {
  show({ untracked: event.target.checked, layers: null, finding: null });
});
const oneColumn = matchMedia("(max-width: 800px)"); // as in the style
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const { layer, finding, view } = button.dataset;
  if (layer !== undefined) showLayer(Number(layer), event.ctrlKey || event.metaKey || event.shiftKey);
  if (finding !== undefined) showFinding(Number(finding));
  if (view !== undefined) show({ view });
  if (button.id === "reset") show(everything);
  if ((layer ?? finding) !== undefined && oneColumn.matches) document.getElementById("plots").scrollIntoView();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") show(everything);
});
document.getElementById("filter").addEventListener("input", (event) => {
  const wanted = event.target.value.toLowerCase();
  for (const button of document.querySelectorAll("[data-layer]")) {
    button.parentElement.hidden = !data.layers[button.dataset.layer].toLowerCase().includes(wanted);
  }
});
prefersDark.addEventListener("change", () => show({}));
for (const [event, value] of [["beforeprint", true], ["afterprint", false]]) {
  addEventListener(event, () => {
    printing = value;
    show({});
  });
}
