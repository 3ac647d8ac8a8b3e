// What a node shows on the node of a subgraph that holds it: tooltips of its widgets, and the newest picture of a run.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

// The page knows tooltips by the type of the node, and a subgraph's node has a type of its own.
let translations = {};

function explain(node) {
    const language = String(app.ui.settings.getSettingValue("Comfy.Locale") ?? "en").split("-")[0];
    const translated = translations[language]?.nodeDefs?.[node.comfyClass]?.inputs ?? {};
    const { required, optional } = node.constructor.nodeData?.input ?? {};
    const specified = { ...required, ...optional };
    for (const widget of node.widgets ?? [])
        widget.tooltip ??= translated[widget.name]?.tooltip ?? specified[widget.name]?.[1]?.tooltip;
}

// The previews of a run, then its video. The page itself shows a promoted preview once there is one and "Disconnected"
// until then. This widget is always there, and takes no room on its own node, nor where there is no picture.

const VIDEOS = ["TAV_SaveVideo", "TAV_CompareVideos"];
const SHOWING = ["TAV_OneShotTune", "TAV_DDIMInvert", "TAV_Sample", ...VIDEOS];
// Names that begin so are previews to the page; Nodes 2.0 then shows them by itself.
const NAME = "$$tav-preview";
const MARGIN = 15;

// node -> its picture and when it came.
const seen = new WeakMap();

function picture(node) {
    const video = node.videoContainer?.querySelector("video");
    const source = video?.videoWidth ? video : node.imgs?.[node.imageIndex ?? 0];
    const width = source?.videoWidth ?? source?.naturalWidth, height = source?.videoHeight ?? source?.naturalHeight;
    if (!width) return null;
    if (seen.get(node)?.source !== source) seen.set(node, { source, width, height, since: performance.now() });
    return seen.get(node);
}

// The node's picture, if it is the newest of its graph and the graph is not the one on the canvas.
function shown(node) {
    if (!node.graph || app.canvas?.graph === node.graph) return null;
    const own = picture(node);
    const others = node.graph.nodes.filter((each) => SHOWING.includes(each.comfyClass)).map(picture);
    return own && others.every((other) => !other || other.since <= own.since) ? own : null;
}

function heightWithin(found, width) {
    return found ? Math.round(Math.min(width, (width * found.height) / found.width)) : 0;
}

function draw(node, context, width, top) {
    const found = shown(node), height = heightWithin(found, width - 2 * MARGIN);
    if (!height) return;
    const drawn = (height * found.width) / found.height;
    context.drawImage(found.source, (width - drawn) / 2, top, drawn, height);
    if (!(found.source instanceof HTMLVideoElement)) return;
    if (found.source.paused) {
        found.source.muted = true;
        found.source.play().catch(() => {});
    }
    requestAnimationFrame(() => app.canvas.setDirty(true, false));
}

app.registerExtension({
    name: "TuneAVideo.Subgraph",
    async init() {
        translations = await (await api.fetchApi("/i18n")).json();
    },
    nodeCreated(node) {
        if (node.comfyClass?.startsWith("TAV_")) explain(node);
        if (!SHOWING.includes(node.comfyClass)) return;
        // Within a subgraph Nodes 2.0 takes pictures of an unknown kind for images.
        if (VIDEOS.includes(node.comfyClass)) node.previewMediaType = "video";
        // Of the kinds of widgets that the page copies to a subgraph's node, a button is the simplest.
        const widget = node.addWidget("button", NAME, null, () => {}, { serialize: false, canvasOnly: true });
        widget.serialize = false;
        widget.computeLayoutSize = (holder) => {
            const height = heightWithin(shown(node), (holder?.size[0] ?? 0) - 2 * MARGIN);
            return { minHeight: height, maxHeight: height, minWidth: 0 };
        };
        widget.drawWidget = function (context, { width }) {
            draw(node, context, width, this.y);
        };
    },
});
