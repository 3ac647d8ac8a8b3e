// Which values of a node's widgets the page sends to the queue, and how.
import { app } from "../../../scripts/app.js";

const SAVING = ["TAV_SaveVideo", "TAV_SaveMotion"];

// The page replaces %date:yyyy-MM-dd% and %Node.widget% in the file names of ComfyUI's own nodes alone.
function replaceInName(node) {
    const replaced = window.comfyAPI?.utils?.applyTextReplacements;
    const widget = SAVING.includes(node.comfyClass) && node.widgets?.find((each) => each.name === "filename_prefix");
    if (widget && replaced) widget.serializeValue = () => replaced(app, String(widget.value));
}

// Once a node plays a video, the page queues the player as an input. ComfyUI's cache then takes the node for changed:
// it would load the clip, tune and invert again.
function leaveOutPlayer(node) {
    const { addDOMWidget } = node;
    node.addDOMWidget = function () {
        const widget = addDOMWidget.apply(this, arguments);
        if (widget.name === "video-preview") widget.options = { ...widget.options, serialize: false };
        return widget;
    };
}

app.registerExtension({
    name: "TuneAVideo.Queued",
    nodeCreated(node) {
        if (!node.comfyClass?.startsWith("TAV_")) return;
        replaceInName(node);
        leaveOutPlayer(node);
    },
});
