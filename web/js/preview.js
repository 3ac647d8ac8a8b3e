// The newest picture of the nodes in a subgraph, on the subgraph's node: the previews of a run, then its video. The page
// itself shows a promoted preview once there is one and "Disconnected" until then. This widget is always there, and
// takes no room on its own node, nor where there is no picture.
import { app } from "../../../scripts/app.js";

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
    name: "TuneAVideo.Preview",
    nodeCreated(node) {
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
