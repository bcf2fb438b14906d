(() => {
  const form = document.querySelector(".filter");
  const words = form.querySelector("input");
  const rows = [...document.querySelectorAll(".answers tbody tr")].map(row => [row, row.textContent.toLowerCase()]);
  const show = () => {
    const wanted = words.value.trim().toLowerCase();
    let shown = 0;
    for (const [row, text] of rows) shown += !(row.hidden = !text.includes(wanted));
    for (const section of document.querySelectorAll(".answers section"))
      section.hidden = !section.querySelector("tbody tr:not([hidden])");
    form.querySelector("output").value = shown + " of " + rows.length + " shown";
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", event => event.preventDefault());
  form.hidden = !rows.length;
  show();
})();
