(() => {
  for (const form of document.querySelectorAll(".filter")) {
    const box = form.parentElement;
    const [kind, method] = form.querySelectorAll("select");
    const [words, failures] = form.querySelectorAll("input");
    const items = [...box.querySelectorAll(".item")].map(item => ({
      item, text: item.textContent.toLowerCase(),
      rows: [...item.querySelectorAll("tr[data-m]")].map(row => ({row, methods: row.dataset.m.split(" "), failed: row.classList.contains("fail")})),
    }));
    const show = () => {
      const wanted = words.value.trim().toLowerCase();
      let shown = 0;
      for (const {item, text, rows} of items) {
        const mine = rows.filter(one => !method.value || one.methods.includes(method.value));
        for (const one of rows) one.row.hidden = !mine.includes(one);
        item.hidden = (kind.value && item.dataset.k !== kind.value) || !text.includes(wanted) || !mine.length
          || (failures.checked && !mine.some(one => one.failed));
        shown += !item.hidden;
      }
      for (const group of box.querySelectorAll(".kind")) {
        group.hidden = !group.querySelector(".item:not([hidden])");
        if (kind.value && !group.hidden) group.open = true;
      }
      form.querySelector("output").value = shown + " of " + items.length + " questions shown";
    };
    form.addEventListener("input", show);
    form.addEventListener("submit", event => event.preventDefault());
    form.hidden = !items.length;
    show();
  }
})();
