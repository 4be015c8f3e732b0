// Listeners for the page, once, whatever the number of panels on it.
if (!window.glm4vPanel) {
  window.glm4vPanel = true;
  // ipywidgets has no key events: Ctrl+Enter presses Ask of the panel with the focus.
  document.addEventListener('keydown', event => {
    if (!(event.ctrlKey || event.metaKey) || event.key !== 'Enter') return;
    const panel = event.target.closest && event.target.closest('.glm4v-panel');
    if (!panel || event.target.tagName !== 'TEXTAREA') return;
    event.preventDefault();
    event.stopPropagation();
    // The last keystroke has to reach the kernel before the click does.
    setTimeout(() => panel.querySelector('.glm4v-ask').click(), 150);
  }, true);
  // The kernel knows nothing of an error that was written here: the next choice takes it away.
  const forget = panel => {
    const status = panel && panel.querySelector('.glm4v-status[data-before]');
    if (status) status.outerHTML = status.dataset.before;
  };
  document.addEventListener('change', event => {
    forget(event.target.closest && event.target.closest('.glm4v-panel'));
  }, true);
  // A message that is too large closes the kernel's connection, and no error is shown: such a file
  // is not sent. The input that opens the chooser is on no page; it is caught as it is clicked.
  document.addEventListener('click', event => {
    const button = event.target.closest && event.target.closest('.glm4v-upload');
    if (!button) return;
    const panel = button.closest('.glm4v-panel');
    const most = Number(panel.querySelector('[data-most-bytes]').dataset.mostBytes);
    const open = HTMLInputElement.prototype.click;
    const restore = () => { HTMLInputElement.prototype.click = open; };
    setTimeout(restore);
    HTMLInputElement.prototype.click = function () {
      restore();
      this.addEventListener('change', chosen => {
        forget(panel);
        const file = [...this.files].find(each => each.size > most);
        if (!file) return;
        chosen.stopImmediatePropagation();
        const status = panel.querySelector('.glm4v-status');
        status.dataset.before = status.outerHTML;
        status.className = 'glm4v-status glm4v-status-error';
        status.innerHTML = '<b>Error</b> · ';
        status.append(`${file.name} has ${(file.size / 1e6).toFixed(1)} MB; expected at most ` +
          `${(most / 1e6).toFixed(1)}, which is what this server passes on. Save it smaller, or ` +
          'start the server with make lab, which passes on more.');
      }, { capture: true, once: true });
      open.call(this);
    };
  }, true);
}
