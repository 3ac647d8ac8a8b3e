// The page replaces %date:yyyy-MM-dd% and %Node.widget% in the file names of ComfyUI's own nodes alone.
import { app } from "../../../scripts/app.js";

const SAVING = ["TAV_SaveVideo", "TAV_SaveMotion"];

app.registerExtension({
    name: "TuneAVideo.FileNames",
    nodeCreated(node) {
        const replaced = window.comfyAPI?.utils?.applyTextReplacements;
        const widget = SAVING.includes(node.comfyClass) && node.widgets?.find((each) => each.name === "filename_prefix");
        if (widget && replaced) widget.serializeValue = () => replaced(app, String(widget.value));
    },
});
