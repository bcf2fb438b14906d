(() => {
  const form = document.querySelector(".filter");
  const [words, failures] = form.querySelectorAll("input");
  const sections = [...document.querySelectorAll(".answers section")];
  const rows = [...document.querySelectorAll(".answers tbody tr")].map(row => [row, row.textContent.toLowerCase()]);
  const show = () => {
    const wanted = words.value.trim().toLowerCase();
    let shown = 0;
    for (const [row, text] of rows) {
      row.hidden = (failures.checked && !row.classList.contains("fail")) || !text.includes(wanted);
      shown += !row.hidden;
    }
    for (const section of sections) section.hidden = !section.querySelector("tbody tr:not([hidden])");
    form.querySelector("output").value = shown + " of " + rows.length + " shown";
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", event => event.preventDefault());
  form.hidden = !rows.length;
  addEventListener("beforeprint", () => { document.querySelector("details").open = true; });
  show();
})();
