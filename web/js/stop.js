// A button in One-Shot Tune that ends the tuning and keeps its weights (nodes/support/stop.py).
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

// The host's translations by language; ours are in locales/*/main.json.
let translations = {};

function texts() {
    const language = String(app.ui.settings.getSettingValue("Comfy.Locale") ?? "en").split("-")[0];
    return (translations[language]?.tuneAVideo ?? translations.en.tuneAVideo).stop;
}

function tell(severity, detail) {
    app.extensionManager.toast.add({ severity, summary: "Tune-A-Video", detail, life: 5000 });
}

// Within a subgraph the server knows a node by the ids on the way to it, "12:3". Two nodes can show one subgraph; then
// the one is meant whose button was pressed, else the one through which it was opened last.
const opened = new WeakMap();

function ways(graph, target) {
    if (graph === target) return [[]];
    const holders = graph.nodes.filter((each) => each.subgraph);
    return holders.flatMap((each) => ways(each.subgraph, target).map((rest) => [each, ...rest]));
}

function serverId(node, pressed) {
    const found = ways(node.graph.rootGraph ?? node.graph, node.graph);
    const chosen = found.find((way) => way.includes(pressed))
        ?? found.find((way) => way.every((each) => (opened.get(each.subgraph) ?? each) === each))
        ?? found[0] ?? [];
    return [...chosen, node].map((each) => each.id).join(":");
}

async function stop(node, pressed) {
    const body = JSON.stringify({ node_id: serverId(node, pressed) });
    try {
        const answer = await api.fetchApi("/tune-a-video/stop", {
            method: "POST", headers: { "Content-Type": "application/json" }, body,
        });
        if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
        const { stopping } = await answer.json();
        if (stopping.length) tell("info", texts().stopping);
        else tell("warn", texts().notTuning);
    } catch (error) {
        tell("error", String(error));
    }
}

app.registerExtension({
    name: "tune-a-video.stop",
    async init() {
        translations = await (await api.fetchApi("/i18n")).json();
    },
    setup() {
        app.canvas.canvas.addEventListener("subgraph-opened", ({ detail }) => {
            if (detail.fromNode) opened.set(detail.subgraph, detail.fromNode);
        });
    },
    nodeCreated(node) {
        if (node.comfyClass !== "TAV_OneShotTune") return;
        // Called with the node on which the button was pressed, which may be the subgraph's that shows it.
        const pressed = (value, canvas, shown) => stop(node, shown);
        // Subgraphs that show the button name it, so that its name is the same in every language.
        const button = node.addWidget("button", "stop", null, pressed, { serialize: false });
        button.label = texts().button;
        // Neither saved with the workflow nor sent with the graph.
        button.serialize = false;
    },
});
