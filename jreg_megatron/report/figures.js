"use strict";
// Puts a live picture in the place of each still one, and connects the controls with it.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const views = new Map();
  const chosen = new Map();
  const picked = new Set();

  // Only what a figure shows counts for it: a model picked elsewhere does not fade all of its lines.
  const pickedIn = (name) => [...document.getElementById(name).querySelectorAll("button.model")]
    .map((button) => button.dataset.model).filter((label) => picked.has(label));

  const makeLinear = (spec) => {
    for (const { encoding: { y } } of spec.layer) {
      if (y && y.scale) {
        y.scale = { type: "linear", zero: true };
        delete y.axis.values;
      }
    }
  };

  const draw = async (name) => {
    const box = document.getElementById(name).querySelector(".picture");
    const spec = structuredClone(figures[name].spec);
    const values = chosen.get(name) || {};
    for (const param of spec.params) {
      if (param.name === "picked") param.value = pickedIn(name);
      else if (param.name in values) param.value = values[param.name];
    }
    if (values.scale === "linear") makeLinear(spec);
    const place = document.createElement("div");
    place.className = "live";
    const still = box.firstElementChild;
    box.prepend(place);
    const previous = views.get(name);
    try {
      const result = await vegaEmbed(place, spec, {
        mode: "vega-lite", renderer: "svg", ast: true, actions: false, defaultStyle: false,
        tooltip: { disableDefaultStyle: true, theme: "page" },
      });
      views.set(name, result);
      still.remove();
      if (previous) previous.finalize();
    } catch (error) {
      place.remove();
      console.error(name, error);
    }
  };

  const show = (figure) => {
    const words = [...figure.querySelectorAll("fieldset")].map((set) =>
      `${set.querySelector("legend").textContent}: ${set.querySelector("input:checked + span").textContent}`);
    figure.querySelector("[data-chosen]").textContent = words.join("; ");
  };

  for (const input of document.querySelectorAll(".choices input")) {
    input.addEventListener("change", async () => {
      const figure = input.closest("figure");
      const name = figure.id;
      chosen.set(name, { ...chosen.get(name), [input.dataset.field]: input.value });
      show(figure);
      if (input.dataset.field === "scale") await draw(name);
      else if (views.has(name)) await views.get(name).view.signal(input.dataset.field, input.value).runAsync();
    });
  }

  const buttons = [...document.querySelectorAll("button.model")];
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const model = button.dataset.model;
      if (!picked.delete(model)) picked.add(model);
      for (const other of buttons) other.setAttribute("aria-pressed", String(picked.has(other.dataset.model)));
      for (const [name, { view }] of views) {
        if (figures[name].spec.params.some((param) => param.name === "picked")) {
          view.signal("picked", pickedIn(name)).runAsync();
        }
      }
    });
  }

  const names = Object.keys(figures);
  window.reportDrawn = (async () => { for (const name of names) await draw(name); return names.length; })();
})();
