"use strict";
// Every chart names the lists of records it draws; each gets records of its own, because a view marks those it takes.
const { charts, data } = JSON.parse(document.getElementById("charts").textContent);
const records = ({ columns, rows }) => rows.map((row) => Object.fromEntries(columns.map((c, i) => [c, row[i]])));
const drawn = Object.entries(charts).map(async ([name, spec]) => {
  const box = document.getElementById(`chart-${name}`);
  spec.datasets = Object.fromEntries(spec.datasets.map((of) => [of, records(data[of])]));
  try {
    await vegaEmbed(box, spec, { renderer: "svg", actions: false, ast: true, tooltip: { offsetX: 14, offsetY: 14 } });
  } catch (error) {
    box.textContent = `This chart could not be drawn: ${error.message}`;
    console.error(error);
  }
});
Promise.all(drawn).then(() => document.documentElement.classList.add("drawn"));
