// What a node shows on the node of a subgraph that holds it: tooltips of its widgets, its buttons, and the newest picture
// of a run.
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

const COMPARISON = "TAV_CompareVideos";
const SAVED = "TAV_SaveVideo";
const VIDEOS = [SAVED, COMPARISON];
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

// The node's picture, if it is the newest of its graph and the graph is not the one on the canvas. A comparison replaces
// the saved edit, which it contains.
function shown(node) {
    if (!node.graph || app.canvas?.graph === node.graph) return null;
    const showing = node.graph.nodes.filter((each) => SHOWING.includes(each.comfyClass) && picture(each));
    const compared = showing.some((each) => each.comfyClass === COMPARISON);
    const rivals = compared ? showing.filter((each) => each.comfyClass !== SAVED) : showing;
    const newest = Math.max(...rivals.map((each) => picture(each).since));
    return rivals.includes(node) && picture(node).since === newest ? picture(node) : null;
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

// Adds the widget in which `holder` shows the picture of `nodes`: the node itself, or those of a subgraph.
function addPicture(holder, nodes) {
    // Of the kinds of widgets that the page copies to a subgraph's node, a button is the simplest.
    const widget = holder.addWidget("button", NAME, null, () => {}, { serialize: false, canvasOnly: true });
    widget.serialize = false;
    const newest = () => nodes().find(shown);
    widget.computeLayoutSize = (drawnOn) => {
        const node = newest();
        const height = node ? heightWithin(shown(node), (drawnOn?.size[0] ?? 0) - 2 * MARGIN) : 0;
        return { minHeight: height, maxHeight: height, minWidth: 0 };
    };
    widget.drawWidget = function (context, { width }) {
        const node = newest();
        if (node) draw(node, context, width, this.y);
    };
}

// Newer pages (that of ComfyUI 0.33) put on a subgraph's node only widgets that are inputs, with a value of its own, and
// drop those that older pages copied there: `properties.proxyWidgets` is gone. There the node gets its own.

function isOlder(holder) {
    return "proxyWidgets" in (holder.properties ?? {});
}

const BUTTONS = { TAV_LoadVideo: "upload", TAV_OneShotTune: "stop" };

function inside(holder) {
    return holder.subgraph.nodes.filter((each) => each.comfyClass?.startsWith("TAV_"));
}

// Subgraphs without a node of ours are none of our business.
function isOurs(holder) {
    return Boolean(holder.graph) && !isOlder(holder) && inside(holder).length > 0;
}

function widgetNamed(holder, name) {
    return holder.widgets?.find((each) => each.name === name);
}

// The widgets of the inner nodes that an input of a subgraph's node sets.
function sources(holder, input) {
    const slot = holder.subgraph.inputs?.find((each) => each.name === input.name);
    const links = (slot?.linkIds ?? []).map((id) => holder.subgraph.getLink?.(id) ?? holder.subgraph.links[id]);
    return links.filter(Boolean).flatMap((link) => {
        const node = holder.subgraph.getNodeById(link.target_id);
        const name = node?.inputs[link.target_slot]?.widget?.name;
        return node?.widgets?.filter((each) => each.name === name) ?? [];
    });
}

// [widget of the subgraph's node, widgets that it sets].
function promoted(holder) {
    return holder.inputs.flatMap((input) => {
        const widget = widgetNamed(holder, input.widget?.name);
        return widget ? [[widget, sources(holder, input)]] : [];
    });
}

function explainInputs(holder) {
    for (const [widget, inner] of promoted(holder)) {
        const tooltip = inner.find((each) => each.tooltip)?.tooltip;
        if (tooltip) widget.tooltip ??= tooltip;
    }
}

// Unpacking takes the inner nodes' own values, and a clip is played from them; the page leaves them as the pack brought
// them.
function passInside(holder) {
    if (!isOurs(holder)) return;
    for (const [widget, inner] of promoted(holder))
        for (const each of inner) {
            if (each.value === widget.value) continue;
            each.value = widget.value;
            each.callback?.(widget.value);
        }
}

// Selects a file that was uploaded to an inner node, as a choice on the subgraph's node would.
function take(holder, widget, file) {
    const before = widget.value, listed = widget.options?.values;
    if (before === file) return;
    if (Array.isArray(listed) && !listed.includes(file)) listed.push(file);
    widget.value = file;
    holder.onWidgetChanged?.(widget.name, file, before, widget);
    app.canvas.setDirty(true, true);
}

function complete(holder) {
    if (!isOurs(holder)) return;
    for (const node of inside(holder)) {
        const button = widgetNamed(node, BUTTONS[node.comfyClass]);
        if (!button) continue;
        // The page made an input of the button, which does nothing.
        const slot = holder.subgraph.inputs.find(({ name, type }) => name === button.name && type === "IMAGEUPLOAD");
        if (slot) holder.subgraph.removeInput(slot);
        if (holder.widgets?.some((each) => each.pressedFor === node)) continue;
        const pressed = async (value, canvas) => {
            await button.callback(value, canvas, holder);
            for (const [widget, inner] of promoted(holder)) {
                const file = inner.find((each) => each.name === "file" && node.widgets.includes(each));
                if (file) take(holder, widget, file.value);
            }
        };
        const own = holder.addWidget("button", button.name, null, pressed, { serialize: false });
        Object.assign(own, { label: button.label, tooltip: button.tooltip, serialize: false, pressedFor: node });
    }
    const showing = () => inside(holder).filter((each) => SHOWING.includes(each.comfyClass));
    if (showing().length && !widgetNamed(holder, NAME)) addPicture(holder, showing);
    // Last, because the page recreates the widgets when an input is removed.
    explainInputs(holder);
}

app.registerExtension({
    name: "TuneAVideo.Subgraph",
    async init() {
        translations = await (await api.fetchApi("/i18n")).json();
    },
    setup() {
        app.canvas.canvas.addEventListener("subgraph-opened", ({ detail }) => {
            if (detail.fromNode) passInside(detail.fromNode);
        });
    },
    nodeCreated(node) {
        if (node.comfyClass?.startsWith("TAV_")) explain(node);
        if (node.subgraph) {
            // Its inner nodes and properties are there when the page has done what it does now.
            const later = () => setTimeout(() => complete(node));
            const also = (event, act) => {
                const before = node[event];
                node[event] = function () {
                    const answer = before?.apply(this, arguments);
                    act();
                    return answer;
                };
            };
            also("onConfigure", later);
            also("onAdded", later);
            also("onSelected", () => passInside(node));
            also("onWidgetChanged", () => passInside(node));
            for (const change of ["widget-promoted", "input-added", "removing-input", "inputs-reordered"])
                node.subgraph.events?.addEventListener(change, later);
            later();
        }
        if (!SHOWING.includes(node.comfyClass)) return;
        // Within a subgraph Nodes 2.0 takes pictures of an unknown kind for images.
        if (VIDEOS.includes(node.comfyClass)) node.previewMediaType = "video";
        addPicture(node, () => [node]);
    },
});
