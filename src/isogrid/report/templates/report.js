"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  root.classList.add("scripts");

  // Charts are drawn when they come into view, and again when the theme changes.
  const colours = () => {
    const style = getComputedStyle(root);
    const resolve = (value) => {
      if (typeof value === "string") {
        const variable = /^var\((--\w+)\)$/.exec(value);
        return variable ? style.getPropertyValue(variable[1]).trim() : value;
      }
      if (Array.isArray(value)) return value.map(resolve);
      if (value && typeof value === "object") {
        return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, resolve(part)]));
      }
      return value;
    };
    return resolve;
  };
  const draw = (chart, width) => {
    const { data, layout } = colours()(JSON.parse(chart.querySelector("script").textContent));
    const plot = chart.querySelector("script + div");
    if (width) layout.width = width;
    else if (plot.clientWidth < 560) {
      for (const trace of data) if (trace.mode) trace.mode = trace.mode.replace("+text", "");
    }
    Plotly.react(plot, data, layout, { displayModeBar: false, responsive: !width });
    chart.dataset.drawn = "";
  };
  const shown = (chart) => !chart.closest("[hidden], details:not([open])");
  const drawShown = () => all(".chart:not([data-drawn])").filter(shown).forEach((chart) => draw(chart));
  const redraw = () => all(".chart[data-drawn]").forEach((chart) => {
    if (shown(chart)) draw(chart);
    else delete chart.dataset.drawn;
  });
  document.addEventListener("toggle", drawShown, true);

  // The theme follows the system until the reader chooses.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const remembered = () => { try { return localStorage.getItem("isogrid-theme") || "auto"; } catch { return "auto"; } };
  let choice = remembered();
  const paint = (theme) => { root.dataset.theme = theme; };
  const apply = () => {
    paint(choice === "auto" ? (dark.matches ? "dark" : "light") : choice);
    button.textContent = `theme: ${choice}`;
    redraw();
  };
  button.addEventListener("click", () => {
    choice = { auto: "light", light: "dark", dark: "auto" }[choice] || "auto";
    try { localStorage.setItem("isogrid-theme", choice); } catch { /* a file without storage keeps the choice for this visit */ }
    apply();
  });
  dark.addEventListener("change", apply);

  // Paper is light, has its own width, and shows every model.
  let hidden = [];
  addEventListener("beforeprint", () => {
    paint("light");
    hidden = all(".model[hidden]");
    for (const model of hidden) model.hidden = false;
    for (const chart of all(".chart").filter(shown)) draw(chart, chart.closest(".layer") ? 460 : 680);
  });
  addEventListener("afterprint", () => {
    for (const model of hidden) model.hidden = true;
    apply();
  });

  // One model at a time.
  const tabs = all("[role=tab]");
  const panelOf = (tab) => document.getElementById(tab.getAttribute("aria-controls"));
  const select = (tab) => {
    for (const other of tabs) {
      const chosen = other === tab;
      other.setAttribute("aria-selected", chosen);
      other.tabIndex = chosen ? 0 : -1;
      panelOf(other).hidden = !chosen;
    }
    const list = tab.parentElement;
    list.scrollLeft = tab.offsetLeft - (list.clientWidth - tab.clientWidth) / 2;
    drawShown();
  };
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => {
      select(tab);
      history.replaceState(null, "", `#${panelOf(tab).id}`);
    });
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(index + step + tabs.length) % tabs.length];
      next.click();
      next.focus();
    });
  });
  const follow = () => {
    const tab = tabs.find((candidate) => `#${panelOf(candidate).id}` === location.hash);
    if (tab) { select(tab); panelOf(tab).scrollIntoView(); }
  };
  addEventListener("hashchange", follow);
  for (const unfold of all("[data-unfold]")) {
    unfold.addEventListener("click", () => {
      const layers = all(".layer", unfold.closest(".model"));
      const open = layers.some((layer) => !layer.open);
      for (const layer of layers) layer.open = open;
      unfold.textContent = open ? "close all" : "open all";
    });
  }

  apply();
  if (tabs.length) select(tabs[0]);
  follow();
  drawShown();
})();
