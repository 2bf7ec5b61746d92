// Tells the app where the pointer is on the pictures, as shares of their width and height: ten times a second at most.
let due = null, last = 0;
const tell = (at) => {
  clearTimeout(due);
  const wait = Math.max(0, 100 - (Date.now() - last));
  due = setTimeout(() => { last = Date.now(); trigger('point', { at }); }, wait);
};
document.addEventListener('pointermove', (event) => {
  const stage = document.getElementById('pictures');
  if (!stage || !stage.contains(event.target)) return;
  const image = stage.querySelector('img');
  if (!image || !image.naturalWidth) return;
  const box = image.getBoundingClientRect();
  // The picture is fitted into its box; what is left over belongs to neither side.
  const scale = Math.min(box.width / image.naturalWidth, box.height / image.naturalHeight);
  const width = image.naturalWidth * scale, height = image.naturalHeight * scale;
  const x = (event.clientX - box.left - (box.width - width) / 2) / width;
  const y = (event.clientY - box.top - (box.height - height) / 2) / height;
  if (x >= 0 && x < 1 && y >= 0 && y < 1) tell([x, y]);
});
