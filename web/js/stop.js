// A button in One-Shot Tune that ends the tuning and keeps what it has learnt (nodes/stop.py).
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const TEXTS = {
    en: ["Stop and keep", "Tuning ends after this step; its weights are kept.", "This node is not tuning now."],
    ko: ["중단하고 결과 유지", "이번 스텝을 마치고 튜닝을 끝냅니다. 학습된 가중치는 유지됩니다.", "이 노드는 지금 튜닝 중이 아닙니다."],
    zh: ["停止并保留", "本步完成后结束微调，已学到的权重会保留。", "此节点当前没有在微调。"],
    ja: ["停止して保持", "このステップの後に学習を終え、重みを保持します。", "このノードは今学習していません。"],
};

function texts() {
    const language = String(app.ui.settings.getSettingValue("Comfy.Locale") ?? "en").split("-")[0];
    return TEXTS[language] ?? TEXTS.en;
}

function tell(severity, detail) {
    app.extensionManager.toast.add({ severity, summary: "Tune-A-Video", detail, life: 5000 });
}

async function stop(node) {
    const body = JSON.stringify({ node_id: String(node.id) });
    try {
        const answer = await api.fetchApi("/tune-a-video/stop", {
            method: "POST", headers: { "Content-Type": "application/json" }, body,
        });
        if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
        const { stopping } = await answer.json();
        if (stopping.length) tell("info", texts()[1]);
        else tell("warn", texts()[2]);
    } catch (error) {
        tell("error", String(error));
    }
}

app.registerExtension({
    name: "tune-a-video.stop",
    nodeCreated(node) {
        if (node.comfyClass !== "TAV_OneShotTune") return;
        const button = node.addWidget("button", texts()[0], null, () => stop(node), { serialize: false });
        // Neither saved with the workflow nor sent with the graph.
        button.serialize = false;
    },
});
