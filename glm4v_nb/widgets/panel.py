"""``PromptPanel``: ask a model about a picture, with streaming, Stop and the cards' memory."""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping

import ipywidgets as widgets
import torch
from PIL import Image

from glm4v_nb.cleanup import clear_frames, empty_caches
from glm4v_nb.inference import Sampling, Stream, load, stream
from glm4v_nb.miniature import sample_pictures
from glm4v_nb.model.image_processing import load_image
from glm4v_nb.widgets import html
from simgpu import Rig

REFRESH_SECONDS = 0.1
NO_PICTURE = "(no picture)"
READY = "Ready: ask about the picture, or without one."


class PromptPanel(widgets.VBox):
    """A picture, a question, a streamed answer; show it as the last line of a cell.

    ``state`` ("idle", "loading", "running", "stopping", "error") says what can be pressed. The work
    happens in a thread, so the kernel stays free; only traits of widgets are changed from it. A
    question that fails leaves the conversation as it was.

    Args:
        model, processor: as ``inference.load`` returns them.
        rig: whose memory the bars show; this machine's by default.
        rehearse: called in the worker as ``rehearse(messages, sampling)`` inside ``with rig:``
            before the model answers, as to run a prompt of the same size on simulated cards. An
            error of it is an error of the question.
        samples: pictures to choose from, name to PIL image; drawn scenes by default.
        timeout_seconds: see ``inference.stream``.
    """

    def __init__(
        self,
        model=None,
        processor=None,
        *,
        rig=None,
        rehearse: Callable | None = None,
        samples: Mapping[str, Image.Image] | None = None,
        timeout_seconds: float = 120.0,
    ):
        self.model, self.processor = model, processor
        self.rig = rig or Rig.here()
        self.rehearse = rehearse
        self.timeout_seconds = timeout_seconds
        chosen = sample_pictures() if samples is None else samples
        self.samples = {name: load_image(picture) for name, picture in chosen.items()}
        self.history: list[dict] = []  # messages, as inference takes them
        self.image: Image.Image | None = None
        self._turns: list[str] = []  # the same history as HTML
        self._stream: Stream | None = None
        self._hung: Stream | None = None  # given up, but not ended yet
        self._worker: threading.Thread | None = None
        self._lock = threading.RLock()
        self._waiting_upload: dict | None = None
        self._upload_label = ""
        super().__init__(self._build())
        self.add_class("glm4v-panel")
        self._show_history()
        if self.samples:
            self.sample.value = next(iter(self.samples))
        self._enter("idle", READY)
        self._refresh_memory()

    def __repr__(self):  # stored in a notebook instead of the widget; ipywidgets' lists every trait
        return f"PromptPanel({self.state})"

    @classmethod
    def from_checkpoint(cls, checkpoint, **load_options) -> "PromptPanel":
        """A panel that shows at once and loads meanwhile; arguments as ``inference.load``."""
        panel = cls()
        panel._enter("loading", f"Loading {checkpoint} ...")
        panel._start(panel._load, checkpoint, load_options)
        return panel

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait for the work in progress, for scripts and tests; whether it ended."""
        if self._worker is not None:
            self._worker.join(timeout_seconds)
        return not (self._worker and self._worker.is_alive())

    # What the reader presses

    def ask(self, _=None):
        """Send the question in the box; what the Ask button does."""
        question = self.question.value.strip()
        if self.state not in ("idle", "error"):  # a second click on its way
            return
        if self.model is None:
            self._enter("error", "No model is loaded. Make the panel with one, or from_checkpoint.")
        elif self._hung is not None and self._hung.running:
            how = "wait for its end, or restart the kernel."
            self._enter("error", f"The answer that was given up still runs: {how}")
        elif not question:
            self._enter("idle", "The question is empty: write one, then press Ask or Ctrl+Enter.")
        else:
            message = {"role": "user", "content": question}
            if self.image is not None and not self.history:
                message["image"] = self.image  # stays in view for the whole conversation
            sampling = Sampling(self.max_tokens.value, self.temperature.value, self.top_p.value)
            self._enter("running", "Reading the picture and the question ...")
            self._start(self._answer, [*self.history, message], sampling)

    def stop(self, _=None):
        """End the answer within one token; what came so far is kept."""
        with self._lock:  # the worker may be finishing this very moment
            if self.state != "running":
                return
            self._enter("stopping", "Stopping after this token ...")
            if self._stream is not None:
                self._stream.cancel()

    def clear(self, _=None):
        """Forget the conversation; the picture stays."""
        if self.state in ("idle", "error"):
            self._forget("New conversation.")

    # The worker

    def _start(self, work: Callable, *arguments):
        self._worker = threading.Thread(target=work, args=arguments, daemon=True)
        self._worker.start()

    def _load(self, checkpoint, options: dict):
        try:
            self.model, self.processor = load(checkpoint, **options)
        except Exception as error:
            self._fail(error, None)
        else:
            self._finish("idle", "Ready.")

    def _answer(self, messages: list[dict], sampling: Sampling):
        answered = threading.Event()

        def watch_memory():
            while not answered.wait(2 * REFRESH_SECONDS):
                self._refresh_memory()

        threading.Thread(target=watch_memory, daemon=True).start()
        try:
            with self.rig, self.rig.stage("question"):
                if self.rehearse is None:
                    answer = self._streamed(messages, sampling)
                else:
                    self.rehearse(messages, sampling)
            if self.rehearse is not None:  # the model that answers is not on the rig's cards
                answer = self._streamed(messages, sampling)
        except Exception as error:
            self._fail(error, sampling)
            return
        finally:
            self._stream = None
            answered.set()
        question, note = messages[-1]["content"], html.answer_note(answer)
        self.history = [*messages, {"role": "assistant", "content": answer.text}]
        said = html.turn("Model", answer.text or "(no text)", note)
        self._turns += [html.turn("You", question), said]
        self._show_history()
        if self.question.value.strip() == question:
            self.question.value = ""  # unless the next one is being written
        endings = {"cancelled": "Stopped.", "length": "Reached max tokens."}
        ending = endings.get(answer.finish, "Done.")
        self._finish("idle", f"{ending} {note} · first token {answer.first_token_seconds:.2f} s")

    def _streamed(self, messages, sampling):
        asked = html.turn("You", messages[-1]["content"])
        text, shown = "", 0.0
        asking = (self.model, self.processor, messages, sampling)
        with stream(*asking, timeout_seconds=self.timeout_seconds) as pieces:
            with self._lock:
                self._stream = pieces
                if self.state == "stopping":  # pressed before there was anything to cancel
                    pieces.cancel()
            for piece in pieces:
                text += piece
                if time.monotonic() - shown > REFRESH_SECONDS:
                    shown = time.monotonic()
                    self._show_history(asked + html.turn("Model", text + " ▌"))
                    count, speed = pieces.new_tokens, pieces.tokens_per_second
                    self._show_progress(f"{count} tokens · {speed:.1f} tokens/s")
        return pieces.answer

    def _fail(self, error: Exception, sampling: Sampling | None):
        if isinstance(error, TimeoutError):
            self._hung = self._stream
        if not isinstance(error, torch.OutOfMemoryError):
            message = f"{type(error).__name__}: {error}"
        elif sampling is not None:
            message = html.out_of_memory_advice(error, sampling.max_new_tokens)
        else:
            message = (
                "Out of memory while loading: spread the model over more GPUs (device_map='auto'),"
                f" or take fewer bytes a parameter. {error}"
            )
        clear_frames(error)
        # While a cell holds the rig its caches are not ours to empty, and entering it is refused.
        with contextlib.suppress(RuntimeError), self.rig:
            empty_caches()
        self._show_history()
        self._finish("error", message)

    # What is shown

    def _enter(self, state: str, message: str):
        with self._lock:
            self.state = state
            for control in self._controls:
                control.disabled = state not in ("idle", "error")
            self.stop_button.disabled = state != "running"
            self.status.value = html.status(state, message)

    def _show_progress(self, message: str):
        with self._lock:  # Stop may be pressed this very moment
            if self.state == "running":
                self.status.value = html.status("running", message)

    def _finish(self, state: str, message: str):
        self._enter(state, message)
        self._refresh_memory()
        if self._waiting_upload is not None:
            file, self._waiting_upload = self._waiting_upload, None
            self._take(file)

    def _show_history(self, unfinished: str = ""):
        turns = "".join(self._turns) + unfinished
        self.conversation.value = turns or html.note("The conversation appears here.")

    def _refresh_memory(self):
        try:
            self.memory.value = html.memory_bars(self.rig.memory(), self.rig.provenance)
        except RuntimeError as error:  # CUDA answers nothing any more after some errors
            self.memory.value = html.note(f"The memory cannot be read: {error}")

    def _forget(self, message: str):
        self.history, self._turns = [], []
        self._show_history()
        self._enter("idle", message)

    # The picture

    def _sample_chosen(self, change):
        if change["new"] == NO_PICTURE:
            self._show_picture(None, "No picture: only the text is asked.")
        elif change["new"] in self.samples:
            self._show_picture(self.samples[change["new"]], change["new"])

    def _uploaded(self, change):
        if not change["new"]:
            return
        file = change["new"][0]
        self.upload.value = ()  # the same file can be chosen again
        if self.state in ("idle", "error"):
            self._take(file)
        else:  # it was on its way when the question was sent
            self._waiting_upload = file

    def _take(self, file: dict):
        name, content, size = file["name"], bytes(file["content"]), file["size"]
        try:
            if len(content) != size:
                raise ValueError(f"only {len(content):,} of {size:,} bytes arrived; upload again.")
            image = load_image(content)
        except (ValueError, OSError) as error:
            self._enter("error", f"{name}: {error} The picture before it is still chosen.")
            return
        # One upload at a time: a photograph takes a hundred megabytes of the kernel's memory.
        self.samples.pop(self._upload_label, None)
        label = self._upload_label = f"Uploaded: {name}"
        self.samples[label] = image
        # New options choose the first for a moment.
        self.sample.unobserve(self._sample_chosen, "value")
        self.sample.options = [NO_PICTURE, *self.samples]
        self.sample.value = label
        self.sample.observe(self._sample_chosen, "value")
        self._show_picture(image, name)

    def _show_picture(self, image: Image.Image | None, name: str):
        self.image = image
        self.picture.value = html.picture(image, name)
        if self.history:
            self._forget("New picture, new conversation: a conversation is about one picture.")
        else:
            self._enter("idle", READY)

    # The widgets

    def _build(self) -> list[widgets.Widget]:
        """Make the controls, which are attributes, and lay them out in two columns."""
        wide = {"layout": {"width": "100%"}}
        names = [NO_PICTURE, *self.samples]
        self.sample = widgets.Dropdown(options=names, description="Sample", **wide)
        self.sample.observe(self._sample_chosen, "value")
        self.upload = widgets.FileUpload(accept="image/*", description="Upload a picture", **wide)
        self.upload.add_class("glm4v-upload")
        self.upload.observe(self._uploaded, "value")
        self.question = widgets.Textarea(rows=3, description="Question", **wide)
        self.question.placeholder = "Ask about the picture (Ctrl+Enter sends)"
        self.picture, self.memory, self.status = (widgets.HTML() for _ in range(3))
        self.conversation = widgets.HTML().add_class("glm4v-history")
        self.ask_button = _button("Ask", "Send the question (Ctrl+Enter)", self.ask, "primary")
        self.stop_button = _button("Stop", "End the answer", self.stop, "danger")
        self.clear_button = _button("New conversation", "Forget the conversation", self.clear)
        buttons = [
            self.ask_button.add_class("glm4v-ask"),
            self.stop_button.add_class("glm4v-stop"),
            self.clear_button,
        ]
        look = {"style": {"description_width": "initial"}}
        number = {"layout": {"width": "150px"}, **look}
        slider = {"step": 0.05, "layout": {"width": "250px"}, **look}
        self.max_tokens = widgets.BoundedIntText(
            128, min=1, max=8192, description="Max tokens", **number
        )
        self.temperature = widgets.FloatSlider(
            0.0, min=0, max=2, description="Temperature", **slider
        )
        self.top_p = widgets.FloatSlider(1.0, min=0.05, max=1, description="Top-p", **slider)
        settings = [self.max_tokens, self.temperature, self.top_p]
        self._controls = (self.sample, self.upload, *settings, self.ask_button, self.clear_button)
        picture = widgets.VBox([self.sample, self.upload, self.picture, self.memory])
        rows = [widgets.HBox(buttons), widgets.HBox(settings).add_class("glm4v-settings")]
        talk = widgets.VBox([self.conversation, self.question, *rows, self.status])
        columns = widgets.HBox(
            [picture.add_class("glm4v-picture-column"), talk.add_class("glm4v-talk-column")]
        )
        style = widgets.HTML(html.STYLE + html.SCRIPT)
        return [style, columns.add_class("glm4v-columns")]


def _button(text: str, tooltip: str, pressed: Callable, style: str = "") -> widgets.Button:
    button = widgets.Button(description=text, tooltip=tooltip, button_style=style)
    button.on_click(pressed)
    return button
