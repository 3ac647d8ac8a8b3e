// What is queued of a node's widgets.
import { app } from "../../../scripts/app.js";

const SAVING = ["TAV_SaveVideo", "TAV_SaveMotion"];

// The page replaces %date:yyyy-MM-dd% and %Node.widget% in the file names of ComfyUI's own nodes alone.
function replaceInName(node) {
    const replaced = window.comfyAPI?.utils?.applyTextReplacements;
    const widget = SAVING.includes(node.comfyClass) && node.widgets?.find((each) => each.name === "filename_prefix");
    if (widget && replaced) widget.serializeValue = () => replaced(app, String(widget.value));
}

// The page queues the player of a video as an input, once there is one. To ComfyUI that is another input than before: it
// would load the clip again, and tune and invert anew.
function leaveOutPlayer(node) {
    const { addDOMWidget } = node;
    if (!addDOMWidget) return;
    node.addDOMWidget = function () {
        const widget = addDOMWidget.apply(this, arguments);
        if (widget?.name === "video-preview") widget.options = { ...widget.options, serialize: false };
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
