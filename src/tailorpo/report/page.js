// Reads values off the curves: a pointer or finger moves over a chart, or the arrow keys do.
for (const figure of document.querySelectorAll(".chart[data-chart]")) {
  const { x, left, right, lines } = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  const where = figure.querySelector(".where");
  const outputs = [...figure.querySelectorAll(".legend b")];
  const resting = outputs.map((output) => output.textContent);
  let shown = x.length - 1;

  const show = (index) => {
    shown = Math.max(0, Math.min(x.length - 1, index));
    const span = x[x.length - 1] - x[0];
    const at = left + (right - left) * (span ? (x[shown] - x[0]) / span : 0.5);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.style.opacity = 0.5;
    where.textContent = `update ${x[shown].toLocaleString("en")}`;
    lines.forEach((line, i) => {
      const value = line.values[shown];
      outputs[i].textContent = value === null ? "\u2013" : String(value).replace("-", "\u2212");
    });
  };
  const rest = () => {
    cursor.style.opacity = 0;
    where.textContent = "";
    outputs.forEach((output, i) => { output.textContent = resting[i]; });
  };
  const follow = (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const wanted = x[0] + ((at - left) / (right - left)) * (x[x.length - 1] - x[0]);
    let best = 0;
    x.forEach((value, i) => { if (Math.abs(value - wanted) < Math.abs(x[best] - wanted)) best = i; });
    show(best);
  };
  svg.tabIndex = 0;
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", rest);
  svg.addEventListener("blur", rest);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) { event.preventDefault(); show(shown + step); }
  });
}
