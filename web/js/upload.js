// Load Video's button and its drop area take every container that the readers know (EXTENSIONS in
// tav_core/media/probe.py). The page's own take what the browser calls a video: of many systems, not mkv, mts or ts.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const EXTENSIONS = (".3g2 .3gp .apng .asf .avi .divx .f4v .flv .gif .m1v .m2t .m2ts .m2v .m4v .mk3d .mkv .mov .mp4 .mpeg"
    + " .mpg .mts .mxf .ogm .ogv .qt .ts .vob .webm .wmv").split(" ");

function isClip(file) {
    return file.type.startsWith("video/") || EXTENSIONS.some((end) => file.name.toLowerCase().endsWith(end));
}

async function upload(node, file) {
    const widget = node.widgets.find((each) => each.name === "file");
    const body = new FormData();
    body.append("image", file);
    const answer = await api.fetchApi("/upload/image", { method: "POST", body });
    if (answer.status !== 200) {
        const reason = answer.status === 413 ? "larger than --max-upload-size" : `${answer.status} ${answer.statusText}`;
        app.extensionManager.toast.add({ severity: "error", summary: "Tune-A-Video", detail: `${file.name}: ${reason}` });
        return;
    }
    const { name, subfolder } = await answer.json();
    const path = subfolder ? `${subfolder}/${name}` : name;
    if (!widget.options.values.includes(path)) widget.options.values.push(path);
    const before = widget.value;
    widget.value = path;
    widget.callback?.(path);
    // Clears the page's message about a missing clip.
    node.onWidgetChanged?.(widget.name, path, before, widget);
}

app.registerExtension({
    name: "TuneAVideo.Upload",
    nodeCreated(node) {
        if (node.comfyClass !== "TAV_LoadVideo") return;
        const button = node.widgets?.find((each) => each.type === "button");
        if (!button) return;
        // Resolves when the clip is there, or none was chosen.
        button.callback = () => new Promise((resolve) => {
            const input = document.createElement("input");
            input.type = "file";
            input.accept = ["video/*", ...EXTENSIONS].join(",");
            input.onchange = async () => resolve(input.files.length && (await upload(node, input.files[0])));
            input.oncancel = resolve;
            input.click();
        });
        const { onDragOver, onDragDrop } = node;
        node.onDragOver = function (event) {
            const items = [...(event?.dataTransfer?.items ?? [])];
            return items.some((item) => item.kind === "file") || Boolean(onDragOver?.apply(this, arguments));
        };
        node.onDragDrop = async function (event) {
            const file = [...(event?.dataTransfer?.files ?? [])].find(isClip);
            if (!file) return Boolean(await onDragDrop?.apply(this, arguments));
            await upload(node, file);
            return true;
        };
    },
});
