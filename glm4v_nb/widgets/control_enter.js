// ipywidgets has no key events: one listener for the page presses Ask of the panel with the focus.
if (!window.glm4vControlEnter) {
  window.glm4vControlEnter = true;
  document.addEventListener('keydown', event => {
    if (!(event.ctrlKey || event.metaKey) || event.key !== 'Enter') return;
    const panel = event.target.closest && event.target.closest('.glm4v-panel');
    if (!panel || event.target.tagName !== 'TEXTAREA') return;
    event.preventDefault();
    event.stopPropagation();
    // The last keystroke has to reach the kernel before the click does.
    setTimeout(() => panel.querySelector('.glm4v-ask').click(), 150);
  }, true);
}
